"""Loading and unloading modules: what they get, what is refused, and that a refusal leaves nothing behind."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from machines import FIXTURES, boot, count_of, image, new_ops

from elf.errors import ElfError, KlpemuError, SymbolError
from elf.image import Image
from emu.errno import KernelErrno
from emu.machine import Machine
from emu.module import module_name
from emu.paging import Access
from emu.traps import GuestFault
from emu.view import list_for_each_entry

NOP = bytes.fromhex("0f1f440000")


def world(machine: Machine) -> tuple[Any, ...]:
    """All that a module leaves a trace in."""
    return (
        dict(machine.slab.live),
        dict(machine.area.live),
        dict(machine.percpu.live),
        set(machine.modules.objects),
        list(machine.kallsyms.modules()),
        [record.ip for record in machine.ftrace.records],
        [module.address_ for module in list_for_each_entry(machine.list_head("modules"), "module", "list")],
        set(machine.space.snapshot()._pages),
    )


def compiled(tmp_path: Path, name: str, source: str) -> Image:
    """A module made from C here; skipped where there is no compiler."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    path, code = tmp_path / f"{name}.o", tmp_path / f"{name}.c"
    code.write_text(source)
    flags = [
        "-O2",
        "-pg",
        "-mfentry",
        "-mrecord-mcount",
        "-fno-pic",
        "-mcmodel=kernel",
        "-mno-red-zone",
        "-fno-stack-protector",
    ]
    subprocess.run(["gcc", *flags, "-fcf-protection=none", "-c", code, "-o", path], check=True)
    return Image.open(path)


@pytest.mark.parametrize("name", ["nop_mcount", "endbr", "no_site", "patchable"])
def test_a_loaded_module_computes_what_its_source_says(machine: Machine, name: str) -> None:
    machine.modules.load_module(image(f"{name}.o"))
    for function, expected in (
        ("form_twice", 10),
        ("form_caller", 11),
        ("form_static", 8),
        ("form_both", 19),
    ):
        assert machine.call(machine.kallsyms.address_of(function, name), 5) == expected


@pytest.mark.parametrize(
    ("name", "offset"), [("nop_mcount", 0), ("endbr", 4), ("late_site", 6), ("fix_area", 0)]
)
def test_every_site_is_a_nop_wherever_it_stands_in_its_function(
    machine: Machine, name: str, offset: int
) -> None:
    loaded = machine.modules.load_module(image(f"{name}.o"))
    assert loaded.sites
    functions = {symbol.address for symbol in loaded.placement.ksyms(name) if symbol.is_function}
    for site in loaded.sites:
        assert machine.space.read(site, 5) == NOP
        assert site - offset in functions
    assert {record.ip for record in machine.ftrace.records} >= set(loaded.sites)


@pytest.mark.parametrize("name", ["no_site", "patchable"])
def test_what_has_no_mcount_records_has_no_sites(machine: Machine, name: str) -> None:
    assert machine.modules.load_module(image(f"{name}.o")).sites == []


@pytest.mark.parametrize(("name", "function"), [("late_site", "late_site"), ("endbr", "form_twice")])
def test_a_site_further_in_is_traced_like_one_at_the_start(
    machine: Machine, name: str, function: str
) -> None:
    machine.modules.load_module(image(f"{name}.o"))
    start = machine.kallsyms.address_of(function, name)
    untraced = machine.call(start, 5)
    ops = new_ops(machine)
    machine.ftrace.ftrace_set_filter_ip(ops, start, remove=False)
    machine.ftrace.register_ftrace_function(ops)
    assert machine.call(start, 5) == untraced
    assert count_of(machine, ops) == 1


def test_text_is_text_and_data_is_data(machine: Machine) -> None:
    loaded = machine.modules.load_module(image("kernel.o"), "second")
    placement = loaded.placement
    kinds = {
        section.name: machine.space.access(placement.addresses[section.index])
        for section in placement.image.sections
        if section.index in placement.addresses and section not in placement.per_cpu
    }
    assert kinds[".text"] is Access.EXECUTE
    assert kinds[".rodata"] is Access.READ
    assert kinds[".data"] is kinds[".bss"] is Access.WRITE


def test_a_module_is_a_struct_on_the_modules_list(machine: Machine) -> None:
    loaded = machine.modules.load_module(image("fix_area.o"))
    (module,) = list_for_each_entry(machine.list_head("modules"), "module", "list")
    assert module.address_ == loaded.struct
    assert module.name.rstrip(b"\0") == b"fix_area"


def test_loading_and_unloading_leaves_nothing(machine: Machine) -> None:
    before = world(machine)
    for name in ("fix_area", "endbr", "fix_all", "no_site"):
        machine.modules.load_module(image(f"{name}.o"))
    for name in ("endbr", "no_site", "fix_area", "fix_all"):
        machine.modules.unload_module(name)
    assert world(machine) == before


def test_a_call_into_an_unloaded_module_faults(machine: Machine) -> None:
    machine.modules.load_module(image("endbr.o"))
    address = machine.kallsyms.address_of("form_twice", "endbr")
    machine.modules.unload_module("endbr")
    with pytest.raises(GuestFault, match="jump to unmapped address"):
        machine.call(address, 1)


def test_a_module_comes_back_after_it_was_unloaded(machine: Machine) -> None:
    for _ in range(40):
        machine.modules.load_module(image("endbr.o"))
        assert machine.call(machine.kallsyms.address_of("form_both", "endbr"), 5) == 19
        machine.modules.unload_module("endbr")


def test_per_cpu_data_has_room_of_its_own_in_every_area_and_gives_it_back() -> None:
    machine = boot(cpus=2)
    before = world(machine)
    for _ in range(20):
        loaded = machine.modules.load_module(image("kernel.o"), "second")
        (task,) = machine.kallsyms.named("init_task", "second")
        for each in machine.tasks:
            offset = loaded.placement.value(
                next(symbol for symbol in loaded.placement.image.symbols if symbol.name == "current_task")
            )
            assert offset is not None
            assert offset >= 0x30, "the kernel's own are there"
            stored = machine.space.read(each.cpu.gs_base + offset, 8)
            assert int.from_bytes(stored, "little") == task.address
            call = machine.hub.call(each, machine.kallsyms.address_of("current_pid", "second"))
            assert machine.hub.finish(each, call) == 0, "the pid of the module's own init_task"
        machine.modules.unload_module("second")
    assert world(machine) == before


# Refused.


def misspelt(name: str, symbol: bytes) -> Image:
    """A fixture whose undefined `symbol` got another last letter, which is found nowhere."""
    data = (FIXTURES / name).read_bytes()
    assert b"\0" + symbol + b"\0" in data
    return Image(data.replace(b"\0" + symbol + b"\0", b"\0" + symbol[:-1] + b"@\0"), name)


BAD: dict[str, tuple[Callable[[], Image], str]] = {
    "single NOPs": (lambda: image("single_nops.o"), "single"),
    "an ordinary instruction": (lambda: image("bad_site.o"), "no usable fentry site"),
    "a call of something else": (lambda: image("wrong_call.o"), "fentry"),
    "an unknown symbol": (lambda: misspelt("fix_all.o", b"notrace_add"), "Unknown symbol notrace_ad@"),
    "a linked file": (lambda: image("linked.elf"), "a linked file"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_module_that_cannot_work_is_refused_and_leaves_nothing(machine: Machine, what: str) -> None:
    bad, message = BAD[what]
    before = world(machine)
    with pytest.raises(KlpemuError, match=message) as raised:
        machine.modules.load_module(bad())
    assert str(raised.value)
    assert world(machine) == before
    machine.modules.load_module(image("endbr.o"))


def test_an_unknown_symbol_is_named_with_the_module(machine: Machine) -> None:
    with pytest.raises(SymbolError) as raised:
        machine.modules.load_module(misspelt("fix_all.o", b"notrace_add"), "mine")
    assert raised.value.where == "mine"
    assert "notrace_ad@" in raised.value.what


@pytest.mark.parametrize("name", ["single_nops", "bad_site", "wrong_call"])
def test_a_bad_site_is_named(machine: Machine, name: str) -> None:
    with pytest.raises(ElfError, match=name):
        machine.modules.load_module(image(f"{name}.o"))


def test_a_module_that_is_there_already_is_eexist(machine: Machine) -> None:
    machine.modules.load_module(image("endbr.o"))
    before = world(machine)
    with pytest.raises(KernelErrno, match="EEXIST"):
        machine.modules.load_module(image("endbr.o"))
    assert world(machine) == before


def test_a_name_that_does_not_fit_struct_module_is_enoexec(machine: Machine) -> None:
    machine.modules.load_module(image("endbr.o"), "x" * 55)
    with pytest.raises(KernelErrno, match="ENOEXEC"):
        machine.modules.load_module(image("endbr.o"), "x" * 56)


def test_unloading_what_is_not_loaded_is_enoent_and_vmlinux_stays(machine: Machine) -> None:
    for name in ("nothing", ""):
        with pytest.raises(KernelErrno, match="ENOENT"):
            machine.modules.unload_module(name)


@pytest.mark.parametrize(
    ("owner", "method"),
    [
        ("space", "map"), ("percpu", "write"), ("slab", "kzalloc"), ("kallsyms", "add"),
        ("ftrace", "ftrace_module_init"), ("area", "reserve"), ("percpu", "alloc"),
    ],
)  # fmt: skip
def test_whatever_step_of_loading_fails_nothing_stays(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, owner: str, method: str
) -> None:
    before = world(machine)
    original = getattr(getattr(machine, owner), method)
    calls = []

    def fail_late(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2 or method in ("write", "add", "ftrace_module_init", "reserve", "kzalloc"):
            raise KlpemuError("out of something")
        return original(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(getattr(machine, owner), method, fail_late)
        with pytest.raises(KlpemuError, match="out of something"):
            machine.modules.load_module(image("kernel.o"), "second")
    assert world(machine) == before
    machine.modules.load_module(image("kernel.o"), "second")


# One module needs another.

EXPORTER = """
unsigned long helper(unsigned long x) { return x * 3; }
asm(".section __ksymtab,\\"a\\"; .balign 4; .long helper-., name-., 0; .previous; name: .asciz \\"helper\\"");
"""
USER = "unsigned long helper(unsigned long); unsigned long user(unsigned long x) { return helper(x) + 1; }"


def test_a_module_that_another_one_uses_cannot_go(machine: Machine, tmp_path: Path) -> None:
    machine.modules.load_module(compiled(tmp_path, "exporter", EXPORTER))
    machine.modules.load_module(compiled(tmp_path, "user", USER))
    assert machine.modules.uses("user") == ["exporter"]
    assert machine.call(machine.kallsyms.address_of("user", "user"), 5) == 16
    with pytest.raises(KernelErrno, match="in use by user"):
        machine.modules.unload_module("exporter")
    machine.modules.unload_module("user")
    machine.modules.unload_module("exporter")
    with pytest.raises(SymbolError, match="Unknown symbol helper"):
        machine.modules.load_module(compiled(tmp_path, "user", USER))


def test_a_symbol_that_is_not_exported_is_not_found(machine: Machine) -> None:
    machine.modules.load_module(image("endbr.o"))
    data = (FIXTURES / "fix_all.o").read_bytes().replace(b"\0notrace_add\0", b"\0form_caller\0")
    with pytest.raises(SymbolError, match="Unknown symbol form_caller"):
        machine.modules.load_module(Image(data, "fix_all.o"))


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("a/b/livepatch-sample.ko", "livepatch_sample"),
        ("x.o", "x"),
        ("plain", "plain"),
        ("/a-b.c.o", "a_b.c"),
    ],
)
def test_a_module_is_called_like_its_file(path: str, name: str) -> None:
    assert module_name(path) == name
