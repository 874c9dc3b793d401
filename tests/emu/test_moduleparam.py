"""Module parameters: how a command line is cut up, and what is set, refused and logged."""

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import image
from module_service import delete_module, init_module
from test_module import world

from emu.errno import KernelErrno
from emu.machine import Machine
from emu.moduleparam import next_arg, parameq


def cut(text: str) -> list[tuple[str, str | None]]:
    """All arguments of a command line."""
    found = []
    while text:
        name, value, end = next_arg(text)
        found.append((text[slice(*name)], None if value is None else text[slice(*value)]))
        text = text[end:]
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=1 b=2", [("a", "1"), ("b", "2")]),
        ("a", [("a", None)]),
        ("a= b", [("a", ""), ("b", None)]),
        ('a="x y" b', [("a", "x y"), ("b", None)]),
        ('"a=x y" b', [("a", "x y"), ("b", None)]),
        ('"a b"', [("a b", None)]),
        ('a=x"y z"w', [("a", 'x"y z"w')]),
        ("a=b=c", [("a", "b=c")]),
        ("a\t\nb", [("a", None), ("b", None)]),
        ('a="unfinished x', [("a", "unfinished x")]),
        ("=x", [("=x", None)]),
    ],
)
def test_arguments_are_cut_up_as_the_kernel_does(text: str, expected: list[tuple[str, str | None]]) -> None:
    assert cut(text) == expected


WORD = st.text("abcxyz019_-", min_size=1, max_size=6)
VALUE = st.text("abc, .-=/", max_size=8)


@given(st.lists(st.tuples(WORD, VALUE), max_size=5))
def test_quoted_values_are_what_a_shell_makes_of_them(arguments: list[tuple[str, str]]) -> None:
    text = " ".join(f'{name}="{value}"' for name, value in arguments)
    assert [f"{name}={value}" for name, value in cut(text)] == shlex.split(text)


def test_dashes_and_underscores_are_one() -> None:
    assert parameq("a-b_c", "a_b-c")
    assert not parameq("a-b", "ab")


@pytest.fixture
def options(machine: Machine) -> Machine:
    """A machine with the module that has a parameter of each kind."""
    init_module(machine, image("options.ko"))
    return machine


def get(machine: Machine, name: str) -> str:
    shown = machine.service("read", lambda: machine.modules.param_get("options", name))
    assert isinstance(shown, str)
    return shown


def put(machine: Machine, name: str, text: str) -> None:
    machine.service("write", lambda: machine.modules.param_set("options", name, text))


def test_parameters_of_the_command_line_are_there_when_init_runs(machine: Machine) -> None:
    init_module(machine, image("options.ko"), 'number=12 word="two words" not-off=n list=9,8')
    assert machine.call(machine.kallsyms.address_of("number_seen_by_init", "options")) == 12
    assert get(machine, "word") == "two words\n"
    assert get(machine, "not_off") == "N\n"
    assert get(machine, "list") == "9,8\n"
    assert machine.log.lines == []


def test_what_the_module_was_not_given_stays(options: Machine) -> None:
    shown = {
        name: get(options, name)[:-1] for name, mode in options.modules.parameters("options") if mode & 0o444
    }
    assert shown == {
        "byte": "1", "short": "-2", "ushort": "3", "number": "-4", "unumber": "5", "long": "-6", "ulong": "7",
        "mask": "0x00001f", "on": "N", "not_off": "Y", "once": "N", "flag": "0", "word": "plain",
        "text": "short", "list": "", "words": "a,b,(null)", "dark_mode": "N",
    }  # fmt: skip


def test_a_parameter_without_mode_has_no_file_but_can_be_given(machine: Machine) -> None:
    init_module(machine, image("options.ko"), "hidden=-30000")
    assert "hidden" not in dict(machine.modules.parameters("options"))
    total = machine.call(machine.kallsyms.address_of("sum_of_options", "options"))
    assert total - (1 << 64) < -29000
    with pytest.raises(KernelErrno, match="ENOENT"):
        get(machine, "hidden")


def test_an_unknown_parameter_is_logged_and_ignored(machine: Machine) -> None:
    init_module(machine, image("options.ko"), "nosuch=1 dyndbg=+p async_probe number=1 -- rest of it")
    assert machine.log.lines == [
        "options: unknown parameter 'nosuch' ignored",
        "options: parameters 'rest of it' after `--' ignored",
    ]


@pytest.mark.parametrize(
    ("parameters", "name", "line"),
    [
        ("number=abc", "EINVAL", "options: `abc' invalid for parameter `number'"),
        ("byte=256", "ERANGE", "options: `256' invalid for parameter `byte'"),
        ("number", "EINVAL", "options: `' invalid for parameter `number'"),
        ("not_off", "EINVAL", "options: `' invalid for parameter `not_off'"),
        ("text=much_too_long", "ENOSPC", "options: `much_too_long' too large for parameter `text'"),
        ("list=1,2,3,4,5", "EINVAL", "options: `1' invalid for parameter `list'"),
    ],
)
def test_a_bad_value_refuses_the_module(machine: Machine, parameters: str, name: str, line: str) -> None:
    before = world(machine)
    with pytest.raises(KernelErrno) as raised:
        init_module(machine, image("options.ko"), parameters)
    assert raised.value.name == name
    assert machine.log.lines[-1] == line
    assert world(machine) == before


def test_a_bool_needs_no_value(machine: Machine) -> None:
    init_module(machine, image("options.ko"), "on once flag")
    assert (get(machine, "on"), get(machine, "once"), get(machine, "flag")) == ("Y\n", "Y\n", "1\n")


def test_a_parameter_is_written_later(options: Machine) -> None:
    put(options, "number", "0x10\n")
    assert get(options, "number") == "16\n"
    put(options, "words", "x,y,z")
    assert get(options, "words") == "x,y,z\n"
    put(options, "list", "1,2,3")
    assert get(options, "list") == "1,2,3\n"


def test_rights_are_respected(options: Machine) -> None:
    with pytest.raises(KernelErrno, match="EACCES"):
        put(options, "mask", "1")
    with pytest.raises(KernelErrno, match="EACCES"):
        get(options, "write_only")
    with pytest.raises(KernelErrno, match="ENOENT"):
        get(options, "nosuch")
    with pytest.raises(KernelErrno, match="ENOENT"):
        options.service("read", lambda: options.modules.param_get("nosuch", "x"))


def test_a_refused_write_changes_nothing(options: Machine) -> None:
    with pytest.raises(KernelErrno, match="EINVAL"):
        put(options, "number", "12x")
    assert get(options, "number") == "-4\n"


def test_a_bool_that_can_only_be_enabled_stays_enabled(options: Machine) -> None:
    put(options, "once", "y")
    with pytest.raises(KernelErrno, match="EROFS"):
        put(options, "once", "n")
    assert get(options, "once") == "Y\n"


def test_the_module_s_own_set_function_runs_in_the_guest(options: Machine) -> None:
    put(options, "dark_mode", "on")
    put(options, "write_only", "off")
    assert get(options, "dark_mode") == "N\n"
    assert options.call(options.kallsyms.address_of("times_dark_was_set", "options")) == 2


def test_copies_of_strings_are_freed_when_they_are_replaced_and_with_the_module(machine: Machine) -> None:
    before = world(machine)
    init_module(machine, image("options.ko"), "word=one words=a,b,c")
    live = len(machine.slab.live)
    put(machine, "word", "two")
    assert len(machine.slab.live) == live
    delete_module(machine, "options")
    assert world(machine) == before
