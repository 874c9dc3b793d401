"""Files that guest functions print."""

import pytest
from machines import boot

from emu.machine import Machine
from emu.seq_file import single_open_read


@pytest.fixture
def machine() -> Machine:
    return boot()


def read(machine: Machine, show: str) -> bytes:
    text: bytes = machine.service("read", lambda: single_open_read(machine, machine.symbol(show)))
    return text


def test_a_show_function_of_the_image_prints_its_file(machine: Machine) -> None:
    command_line = machine.variable("saved_command_line").get()
    machine.space.write(command_line, b"x=1 quiet\0")
    assert read(machine, "cmdline_proc_show") == b"x=1 quiet\n"
    assert read(machine, "meminfo_proc_show").splitlines()[0] == b"MemTotal:          65536 kB"


def test_a_file_that_does_not_fit_is_shown_again_with_a_larger_buffer(machine: Machine) -> None:
    long = machine.slab.kzalloc(6000, "a long command line")
    machine.space.write(long, b"y" * 4095 + b"\0")
    machine.variable("saved_command_line").set(long)
    assert read(machine, "cmdline_proc_show") == b"y" * 4095 + b"\n"


def test_nothing_of_it_stays(machine: Machine) -> None:
    before = machine.slab.live.keys() - set()
    read(machine, "meminfo_proc_show")
    assert machine.slab.live.keys() == before


def test_proc_has_what_the_image_can_show(machine: Machine) -> None:
    text = machine.service("read", lambda: machine.kernfs.read("/proc/meminfo"))
    assert text == read(machine, "meminfo_proc_show").decode()


@pytest.mark.parametrize(("size", "stored"), [(4, b"ab"), (3, b"ab"), (2, b"")])
def test_what_does_not_fit_marks_the_buffer_as_full(machine: Machine, size: int, stored: bytes) -> None:
    file = machine.view("seq_file", machine.slab.kzalloc(machine.layouts.sizeof("seq_file"), "seq_file"))
    file.buf, file.size = machine.slab.kzalloc(8, "buffer"), size
    text = machine.slab.kzalloc(8, "text")
    machine.space.write(text, b"ab\0")
    machine.call(machine.symbol("seq_puts"), file.address_, text)
    assert file.count == (len(stored) or size)
    assert machine.space.read(file.buf, 2) == stored.ljust(2, b"\0")


def test_what_the_kernel_was_booted_with_is_its_command_line() -> None:
    machine = boot(command_line="quiet mitigations=off ")
    assert read(machine, "cmdline_proc_show") == b"quiet mitigations=off \n"
