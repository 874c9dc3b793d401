"""kernel.ftrace_enabled and enabled_functions, as files."""

import errno

import pytest
from machines import IPMODIFY, call_at, count_of, new_ops, record_of, registered, site_of

from emu.dyn_ftrace import FtraceFl
from emu.errno import KernelErrno
from emu.events import EventKind
from emu.ftrace import FtraceOpsFl
from emu.machine import Machine
from emu.mounts import proc_dointvec

SYSCTL = "/proc/sys/kernel/ftrace_enabled"
NOP = bytes.fromhex("0f1f440000")


def write(machine: Machine, text: str) -> None:
    machine.service("write", lambda: machine.kernfs.write(SYSCTL, text))


def common_calls(machine: Machine) -> list[int]:
    """Where the calls inside ftrace_caller and ftrace_regs_caller go."""
    found = []
    for name in ("ftrace_call", "ftrace_regs_call"):
        at = machine.symbol(name)
        distance = int.from_bytes(machine.space.read(at + 1, 4), "little", signed=True)
        found.append(at + 5 + distance)
    return found


def test_switched_off_every_site_is_a_nop_and_who_wanted_it_stays_counted(machine: Machine) -> None:
    """ftrace_shutdown_sysctl(): only the _EN flags go; the common trampolines keep their calls."""
    ops = registered(machine, ["area_of", "perimeter_of"])
    registered(machine, ["perimeter_of"])
    before, calls = record_of(machine, "perimeter_of").flags, common_calls(machine)
    write(machine, "0\n")
    assert machine.kernfs.read(SYSCTL) == "0\n"
    assert [site_of(machine, name) for name in ("area_of", "perimeter_of")] == [NOP, NOP]
    assert record_of(machine, "perimeter_of").flags == before & ~FtraceFl.ENABLED
    assert record_of(machine, "area_of").flags == FtraceFl.TRAMP | 1
    assert machine.variable("ftrace_trace_function").get() == machine.symbol("ftrace_stub")
    assert common_calls(machine) == calls
    machine.call(machine.symbol("area_of"), 3, 4)
    assert count_of(machine, ops) == 0


def test_switched_on_again_everything_is_as_it_was(machine: Machine) -> None:
    ops = registered(machine, ["area_of", "perimeter_of"])
    registered(machine, ["perimeter_of"])
    names = ("area_of", "perimeter_of")
    before = [(site_of(machine, name), record_of(machine, name).flags) for name in names]
    write(machine, "0")
    number = machine.events.total
    write(machine, "1")
    poked = {event.address for event in machine.events.since(number) if event.kind is EventKind.POKE}
    assert {machine.symbol("ftrace_call"), machine.symbol("ftrace_regs_call")} <= poked
    assert [(site_of(machine, name), record_of(machine, name).flags) for name in names] == before
    assert common_calls(machine) == [machine.symbol("arch_ftrace_ops_list_func")] * 2
    machine.call(machine.symbol("area_of"), 3, 4)
    assert count_of(machine, ops) == 1


def test_what_is_registered_while_it_is_off_is_called_once_it_is_on(machine: Machine) -> None:
    write(machine, "0")
    ops = registered(machine, ["area_of"])
    assert site_of(machine, "area_of") == NOP
    write(machine, "1")
    assert site_of(machine, "area_of") == call_at(machine.symbol("area_of"), ops.trampoline)
    machine.call(machine.symbol("area_of"), 3, 4)
    assert count_of(machine, ops) == 1


def test_what_is_unregistered_while_it_is_off_is_not_called_when_it_is_on_again(machine: Machine) -> None:
    ops = registered(machine, ["area_of"])
    write(machine, "0")
    machine.service("unregister", lambda: machine.ftrace.unregister_ftrace_function(ops))
    write(machine, "1")
    assert site_of(machine, "area_of") == NOP
    assert record_of(machine, "area_of").flags == 0


def test_a_permanent_ops_keeps_it_on(machine: Machine) -> None:
    """is_permanent_ops_registered(): and the value is 1 then, whatever it was."""
    write(machine, "7")
    assert machine.kernfs.read(SYSCTL) == "7\n"
    ops = registered(machine, ["area_of"], flags=IPMODIFY | FtraceOpsFl.PERMANENT)
    site = site_of(machine, "area_of")
    with pytest.raises(KernelErrno, match="EBUSY"):
        write(machine, "0")
    assert machine.kernfs.read(SYSCTL) == "1\n"
    assert site_of(machine, "area_of") == site
    machine.service("unregister", lambda: machine.ftrace.unregister_ftrace_function(ops))
    write(machine, "0")
    assert machine.kernfs.read(SYSCTL) == "0\n"


def test_a_permanent_ops_cannot_be_registered_while_it_is_off(machine: Machine) -> None:
    write(machine, "0")
    ops = new_ops(machine, ["area_of"], flags=IPMODIFY | FtraceOpsFl.PERMANENT)
    with pytest.raises(KernelErrno, match="EBUSY"):
        machine.service("register", lambda: machine.ftrace.register_ftrace_function(ops))
    assert record_of(machine, "area_of").flags == 0


def test_after_an_ftrace_bug_there_is_no_such_device(machine: Machine) -> None:
    machine.ftrace.disabled.set(1)
    for use in (lambda: machine.kernfs.read(SYSCTL), lambda: machine.kernfs.write(SYSCTL, "1")):
        with pytest.raises(KernelErrno, match="ENODEV"):
            use()


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1", 1),
        ("0\n", 0),
        ("  12 junk", 12),
        ("0x10", 16),
        ("010", 8),
        ("-3", -3),
        ("-2147483648", -(1 << 31)),
    ],
)
def test_the_first_number_of_what_is_written_counts(text: str, number: int) -> None:
    assert proc_dointvec(text) == number


@pytest.mark.parametrize("text", ["", "\n", "x", "1x", "+1", "08", "2147483648", "-", "0x"])
def test_what_is_no_int_is_refused(text: str) -> None:
    with pytest.raises(KernelErrno) as raised:
        proc_dointvec(text)
    assert raised.value.number == errno.EINVAL


def test_enabled_functions_is_a_file_in_both_places(machine: Machine) -> None:
    registered(machine, ["area_of"])
    shown = machine.kernfs.read("/sys/kernel/tracing/enabled_functions")
    assert shown == machine.kernfs.read("/sys/kernel/debug/tracing/enabled_functions")
    assert shown == "".join(f"{line}\n" for line in machine.ftrace.enabled_functions()) != ""
    with pytest.raises(KernelErrno, match="EINVAL"):
        machine.kernfs.write("/sys/kernel/tracing/enabled_functions", "area_of")
