"""What all verbs have in common: exit status, one line of error, colour, pipes, Ctrl-C."""

import re
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from command_line import FIX_AREA, klpemu, process
from terminal import on_a_terminal

VERBS = ("demo", "sites", "verify", "trace", "run")


def complaint(*arguments: str) -> str:
    """The one line of a command line that must be refused as bad usage or input, without `klpemu: `."""
    outcome = klpemu(*arguments)
    assert outcome.status == 2, outcome
    assert outcome.err.startswith("klpemu: ")
    assert outcome.err.count("\n") == 1, outcome.err
    assert klpemu(*arguments, "--json").out == ""
    return outcome.err.removeprefix("klpemu: ").rstrip("\n")


@pytest.fixture
def here(tmp_path: Path, fixtures_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with good and bad files in it."""
    monkeypatch.chdir(tmp_path)
    good = (fixtures_dir / "fix_area.o").read_bytes()
    (tmp_path / "fix_area.o").write_bytes(good)
    (tmp_path / "text.o").write_text("hello\n")
    (tmp_path / "short.o").write_bytes(good[:700])
    (tmp_path / "elf32.o").write_bytes(good[:4] + b"\x01" + good[5:])
    (tmp_path / "empty").mkdir()
    return tmp_path


def test_without_a_verb_the_help_is_shown_and_the_status_is_2() -> None:
    outcome = klpemu()
    assert (outcome.status, outcome.out) == (2, "")
    assert all(verb in outcome.err for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_explains_itself_and_the_common_options(verb: str) -> None:
    outcome = klpemu(verb, "--help")
    assert (outcome.status, outcome.err) == (0, "")
    assert all(word in outcome.out for word in ("--json", "--color", "Exit status"))


@pytest.mark.parametrize("verb", ["sites", "verify", "trace", "run"])
def test_a_verb_without_its_argument_is_bad_usage(verb: str) -> None:
    assert "Missing argument" in complaint(verb)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["bogus"], "No such command 'bogus'"),
        (["demo", "--bogus"], "No such option"),
        (["demo", "--color", "blue"], "'blue' is not one of"),
        (["sites", "missing.o"], "missing.o: cannot be read: No such file or directory"),
        (["sites", "empty"], "empty: no .ko file in this directory"),
        (["sites", "text.o"], "text.o: ELF header: no ELF magic"),
        (["sites", "short.o"], "short.o: ELF header: section headers at"),
        (["sites", "elf32.o"], "elf32.o: ELF header: EI_CLASS is 1; expected ELFCLASS64"),
        (["sites", "builtin:missing.o"], "builtin:missing.o: no such built-in file; there are"),
        (["verify", "missing.o:a=b"], "missing.o: cannot be read"),
        (["verify", "empty:a=b"], "empty: not a regular file"),
        (["verify", "text.o:a=b"], "text.o: ELF header: no ELF magic"),
        (["verify", "short.o:a=b"], "short.o: ELF header"),
        (["verify", "elf32.o:a=b"], "elf32.o: ELF header: EI_CLASS"),
        (["verify", "fix_area.o"], "no livepatch module"),
        (["verify", "fix_area.o:area_of=nope"], "no function 'nope' to replace with"),
        (["verify", "fix_area.o:nope=fixed_area_of"], "symbol 'nope' not found in symbol table (-EINVAL)"),
        (
            ["verify", "builtin:fix_all.o:notrace_add=fixed_fib"],
            "failed to find location for function 'notrace_add'",
        ),
        (
            ["verify", "builtin:fix_same_name.o:same_name=fixed_same_name_one"],
            "unresolvable ambiguity for symbol 'same_name' in object '(null)' (-EINVAL)",
        ),
        (
            ["verify", "builtin:fix_same_name.o:same_name,3=fixed_same_name_one"],
            "symbol position 3 for symbol 'same_name' in object 'vmlinux' not found (-EINVAL)",
        ),
        (["verify", FIX_AREA, FIX_AREA], "a second patch 'fix_area'"),
        (["verify", "--module", "builtin:single_nops.o", FIX_AREA], "five single-byte NOPs"),
        (["verify", "--module", "builtin:bad_site.o", FIX_AREA], "is neither call __fentry__ nor"),
        (["verify", "--module", "builtin:many_fix.o", "--module", "builtin:many_fix.o", FIX_AREA], "EEXIST"),
        (["verify", "--kernel", "builtin:no_site.o", FIX_AREA], "the kernel image describes no struct"),
        (["verify", "--call", "area_of 3", FIX_AREA], "'area_of 3' is no call"),
        (["verify", "--call", "area_of(3)=x", FIX_AREA], "'x' is no value to expect"),
        (["verify", "--budget", "0", FIX_AREA], "'--budget'"),
        (["trace", "nope"], "symbol 'nope' not found in symbol table"),
        (["trace", "same_name"], "unresolvable ambiguity for symbol 'same_name'"),
        (["trace", "area_of", "3+"], "'3+' is no argument"),
        (["trace", "area_of", "0x1ffffffffffffffff"], "does not fit 64 bits"),
        (["trace", "--patch", "fix_area.o:area_of=nope", "area_of"], "no function 'nope'"),
        (["run", "missing.toml"], "missing.toml: cannot be read"),
        (["run", "empty"], "empty: cannot be read: Is a directory"),
        (["run", "text.o"], "text.o:1: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.usefixtures("here")
def test_bad_input_gets_one_line_and_status_2(arguments: list[str], expected: str) -> None:
    assert expected in complaint(*arguments)


@pytest.mark.usefixtures("here")
def test_an_undefined_symbol_is_named_with_its_module(fixtures_dir: Path) -> None:
    """fix_all.o calls functions of the kernel, which this kernel does not have."""
    image = (fixtures_dir / "kernel.o").read_bytes()
    Path("kernel.o").write_bytes(image.replace(b"\0notrace_add\0", b"\0notrace_axx\0"))
    line = complaint("verify", "--kernel", "kernel.o", "builtin:fix_all.o:fib=fixed_fib")
    assert "fix_all: Unknown symbol notrace_add" in line


@pytest.mark.usefixtures("here")
def test_one_unreadable_file_among_several_is_reported_and_the_others_are_listed() -> None:
    outcome = klpemu("sites", "text.o", "builtin:late_site.o", "missing.o")
    assert outcome.status == 2
    assert "late_site+0x6" in outcome.out
    assert [line.split(":")[1].strip() for line in outcome.err.splitlines()] == ["text.o", "missing.o"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trace", "jump_nowhere"], "jump to unmapped address 0xffffffffdeadb000"),
        (["trace", "--budget", "1000", "spin_forever"], "did not return within 1,000 instructions"),
        (["verify", "--budget", "1000", "--call", "spin_forever()", FIX_AREA], "within 1,000 instructions"),
    ],
)
def test_a_failing_guest_is_a_finding_with_registers_and_the_last_instructions(
    arguments: list[str], expected: str
) -> None:
    outcome = klpemu(*arguments)
    assert outcome.status == 1
    first, *rest = outcome.err.splitlines()
    assert first.startswith("klpemu: ")
    assert expected in first
    assert any("rip ffffffff" in line for line in rest)
    last = rest.index(next(line for line in rest if re.fullmatch(r"last \d+ instructions:", line)))
    assert int(rest[last].split()[1]) == len(rest) - last - 1
    assert len(rest) - last - 1 <= 16
    object_ = klpemu(*arguments, "--json").object
    assert object_["holds"] is False
    assert expected in str(object_)


def test_colour_is_for_terminals_unless_it_is_asked_for() -> None:
    assert "\x1b" not in klpemu("demo").out
    assert "\x1b[" in klpemu("demo", "--color", "always").out
    assert "\x1b[" in klpemu("demo", "--color", "always", NO_COLOR="1").out
    assert "\x1b" not in klpemu("demo", "--color", "always", "--json").out
    stripped = re.sub(r"\x1b\[[\d;]*m", "", klpemu("demo", "--color", "always").out)
    assert stripped == klpemu("demo").out


@pytest.mark.parametrize(
    "arguments",
    [
        ["demo"],
        ["trace", "--patch", FIX_AREA, "area_of", "3", "4"],
        ["verify", FIX_AREA],
        ["sites", "builtin:late_site.o"],
    ],
    ids=lambda value: value[0],
)
def test_sixty_columns_are_enough(arguments: list[str]) -> None:
    text = re.sub(r"\x1b\[[\d;]*m", "", on_a_terminal(*arguments, columns=60))
    # What cannot be broken is as long as it is: a path.
    assert [line for line in text.splitlines() if len(line) > 60 and " " in line.strip()] == []
    assert len(text.splitlines()) > 1


def test_a_terminal_has_colour_and_no_color_takes_it_away() -> None:
    assert "\x1b[" in on_a_terminal("demo", columns=100)
    assert "\x1b" not in on_a_terminal("demo", columns=100, NO_COLOR="1")
    assert "\x1b" not in on_a_terminal("demo", "--color", "never", columns=100)


def test_a_reader_that_goes_away_is_no_error() -> None:
    # More than a pipe holds, so that it cannot all be written before the reader goes.
    for arguments in (["sites", "builtin:many.o"], ["sites", "--json", "builtin:many.o"]):
        with process(arguments) as child:
            assert child.stdout is not None
            assert child.stderr is not None
            child.stdout.read(10)
            child.stdout.close()
            assert child.stderr.read() == ""
            assert child.wait() == 141


def test_ctrl_c_ends_an_endless_guest_with_one_line(tmp_path: Path) -> None:
    scenario = tmp_path / "endless.toml"
    scenario.write_text('budget = 10_000_000_000\n[[step]]\ncall = "spin_forever()"\n')
    # A shell starts what runs in the background with SIGINT ignored.
    take_ctrl_c = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    with process(["run", str(scenario)], preexec_fn=take_ctrl_c) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "boot\n"
        time.sleep(0.3)  # the guest must be spinning, which it cannot say
        child.send_signal(signal.SIGINT)
        try:
            _, err = child.communicate(timeout=30)
        finally:
            child.kill()
        assert (child.returncode, err) == (130, "klpemu: interrupted\n")


def test_a_defect_of_klpemu_itself_is_told_from_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("klpemu.verbs.demo.read_scenario", lambda _: 1 / 0)
    outcome = klpemu("demo")
    assert (outcome.status, outcome.out, outcome.err.count("\n")) == (70, "", 1)
    assert "ZeroDivisionError" in outcome.err
