"""Two states compared: what a failure leaves, and what is left when everything is gone."""

from dataclasses import fields, replace

import pytest
from livepatches import Raw, fix_area, fix_area2

from emu.errno import KernelErrno
from klpemu import Kernel
from klpemu.ftrace_users import FtraceUsers
from patches.invariants.before_and_after import (
    RestoredText,
    State,
    failures_leave_the_state_before,
    state_of,
)
from patches.invariants.relocations import fields_for_modules


def changed(before: State, after: State) -> set[str]:
    """The parts that are reported."""
    results = list(failures_leave_the_state_before(before, after))
    assert len(results) == len(fields(State))
    return {each.what.removeprefix("a failure has changed: ") for each in results if each is not None}


def test_an_enabled_patch_shows_in_every_part_of_the_state(kernel: Kernel) -> None:
    before = state_of(kernel.subject())
    kernel.enable(fix_area())
    after = state_of(kernel.subject())
    assert changed(before, after) == {each.name for each in fields(State)} - {"transition"}
    assert changed(after, replace(after, transition=1)) == {"transition"}


def test_a_kernel_is_in_the_same_state_once_a_patch_has_come_and_gone(kernel: Kernel) -> None:
    before = state_of(kernel.subject())
    kernel.enable(fix_area())
    kernel.disable("fix_area")
    assert changed(before, state_of(kernel.subject())) == set()


def test_one_byte_of_text_is_a_change(kernel: Kernel, raw: Raw) -> None:
    before = state_of(kernel.subject())
    raw.flip(kernel.address_of("measure") + 8)
    assert changed(before, state_of(kernel.subject())) == {"text"}


def test_what_a_klp_relocation_has_left_in_a_patch_is_no_change(kernel: Kernel, raw: Raw) -> None:
    kernel.insmod("builtin:klp_lamp.ko")
    before = state_of(kernel.subject())
    kernel.machine.slab.fails = lambda tag: "ftrace_hash" in tag
    with pytest.raises(KernelErrno, match="ENOMEM"):
        kernel.load_module("builtin:lamp.ko")
    kernel.machine.slab.fails = lambda tag: False
    assert changed(before, state_of(kernel.subject())) == set()
    (loaded,) = kernel.subject().livepatches
    in_text = [
        at
        for at in fields_for_modules(loaded)
        if any(text.address < at < text.address + len(text.contents) for text in loaded.texts)
    ]
    raw.flip(in_text[0] - 1)
    assert changed(before, state_of(kernel.subject())) == {"text"}


def test_text_is_compared_with_what_it_was_when_nothing_was_registered(kernel: Kernel, raw: Raw) -> None:
    restored = RestoredText()
    assert list(restored.check(kernel.subject())) == [], "seen for the first time"
    kernel.enable(fix_area())
    assert list(restored.check(kernel.subject())) == [], "something is registered"
    kernel.disable("fix_area")
    results = list(restored.check(kernel.subject()))
    assert results == [None] * len(results) != []
    raw.flip(kernel.address_of("area_of") + 1)
    assert [each.invariant for each in restored.check(kernel.subject()) if each] == [
        "removal_restores_the_text"
    ]


def test_other_text_at_the_same_address_is_compared_with_itself(kernel: Kernel, raw: Raw) -> None:
    """One module goes, and another one comes to where it was."""
    restored = RestoredText()
    subject = kernel.subject()
    list(restored.check(subject))
    first = subject.texts[0]
    raw.flip(first.address)
    contents = bytes([first.contents[0] ^ 0xFF]) + first.contents[1:]
    other = replace(subject, texts=[replace(first, contents=contents)])
    assert list(restored.check(other)) == [], "seen for the first time"
    assert list(restored.check(other)) == [None]


def test_a_patch_on_top_changes_no_text(kernel: Kernel) -> None:
    kernel.enable(fix_area())
    before = state_of(kernel.subject())
    kernel.enable(fix_area2())
    after = state_of(kernel.subject())
    assert set(before.text) <= set(after.text)


def test_what_stays_of_a_tracer_that_went_while_ftrace_was_off_is_no_change(kernel: Kernel, raw: Raw) -> None:
    """ftrace_shutdown() changes no text then, and ftrace_call keeps its call."""
    restored, tracers = RestoredText(), FtraceUsers(kernel)
    list(restored.check(kernel.subject()))
    tracers.register("counter", ["area_of"])
    kernel.write("/proc/sys/kernel/ftrace_enabled", "0")
    list(restored.check(kernel.subject()))
    tracers.unregister("counter")
    results = list(restored.check(kernel.subject()))
    assert results == [None] * len(results) != []
    kernel.write("/proc/sys/kernel/ftrace_enabled", "1")
    assert kernel.verify().holds
    assert not any(restored.check(kernel.subject()))
    raw.flip(kernel.address_of("ftrace_stub") + 1)
    assert any(restored.check(kernel.subject()))
