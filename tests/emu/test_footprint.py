"""What a step of a task touches."""

from emu.footprint import Footprint, Recorder
from emu.paging import Access
from klpemu import Kernel


def _footprint(reads: set[object] = frozenset(), writes: set[object] = frozenset()) -> Footprint:  # type: ignore[assignment]  # never changed
    found = Footprint()
    found.reads |= reads
    found.writes |= writes
    return found


def test_two_that_read_the_same_commute() -> None:
    assert _footprint(reads={1}).commutes_with(_footprint(reads={1}))


def test_one_that_writes_what_the_other_reads_does_not_commute() -> None:
    reader, writer = _footprint(reads={1}), _footprint(writes={1})
    assert not reader.commutes_with(writer)
    assert not writer.commutes_with(reader)
    assert not writer.commutes_with(writer)
    assert writer.commutes_with(_footprint(reads={2}, writes={3}))


def test_what_touches_everything_commutes_with_nothing() -> None:
    everything = Footprint()
    everything.everything = True
    assert not everything.commutes_with(Footprint())
    assert not Footprint().commutes_with(everything)


def test_a_service_is_recorded_by_what_it_reads_and_writes() -> None:
    machine = Kernel.load().machine
    recorder = Recorder(machine)
    at = machine.symbol("jiffies")
    granule = machine.space.physical(at) >> 3
    read, written = Footprint(), Footprint()
    with recorder.into(read):
        data = machine.space.read(at, 8)
    with recorder.into(written):
        machine.space.write(at, data)
    assert (read.reads, read.writes, read.time) == ({granule}, set(), True)
    assert (written.reads, written.writes) == (set(), {granule})


def test_guest_code_is_recorded_by_its_instructions_and_accesses() -> None:
    kernel = Kernel.load()
    machine = kernel.machine
    recorder = Recorder(machine)
    found = Footprint()
    with recorder.into(found):
        kernel.call("area_of", 3, 4)
    assert machine.space.physical(kernel.address_of("area_of")) >> 3 in found.reads
    top = machine.space.physical(machine.init_task.stack_base - 16) >> 3
    assert top in found.reads  # its return address
    assert not found.everything


def test_mapping_a_page_touches_everything() -> None:
    machine = Kernel.load().machine
    recorder = Recorder(machine)
    found = Footprint()
    with recorder.into(found):
        machine.stacks.alloc()
        machine.area.module_alloc(4096, "a test", Access.WRITE)
    assert found.everything
