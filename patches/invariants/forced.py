"""A forced transition, judged by which patches it pins."""

from dataclasses import replace

from emu.events import Event, EventKind
from emu.machine import Machine
from emu.memory import read_string, read_u64
from emu.view import list_for_each_entry
from patches.invariants.finding import Finding, Report

__all__ = ["PINS", "ForcedPatches"]

PINS = "a_force_pins_what_it_removes"
KLP_UNPATCHED = 0


class ForcedPatches:
    """a_force_pins_what_it_removes: A patch is marked as forced, so that its module stays for ever, only
    while a transition is on that removes it: its own unpatching, or the patching of one that replaces it.

    Source: klp_force_transition() of 6.1; 2957308343fa ("livepatch: Don't block removal of patches that are
    safe to unload") (in v5.18).
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._forced = machine.layouts.offsetof("klp_patch", "forced")
        self._checks = 0
        self._findings: list[Finding] = []
        machine.events.listen(self._event, EventKind.STORE)

    def report(self, step: str) -> Report:
        """What was checked and found since the last report."""
        checks, self._checks = self._checks, 0
        found, self._findings = self._findings, []
        return Report(step, {PINS: checks}, tuple(replace(each, step=step) for each in found))

    def _event(self, event: Event) -> None:
        if event.after == b"\x01":
            patch = event.address - self._forced
            if patch in self._listed():
                self._checks += 1
                self._judge(patch)

    def _judge(self, patch: int) -> None:
        machine = self._machine
        transition = read_u64(machine.space, machine.symbol("klp_transition_patch"))
        target = machine.space.read(machine.symbol("klp_target_state"), 1)[0]
        if not transition:
            removes = False
        elif target == KLP_UNPATCHED:
            removes = patch == transition
        else:
            moving = machine.layouts.view("klp_patch", machine.space, transition)
            removes = bool(moving.replace) and patch != transition
        if not removes:
            module = machine.layouts.view("klp_patch", machine.space, patch).mod
            name = read_string(machine.space, module + machine.layouts.offsetof("module", "name"))
            self._findings.append(
                Finding(PINS, f"'{name}' is pinned by a transition that does not remove it", patch)
            )

    def _listed(self) -> list[int]:
        machine = self._machine
        head = machine.layouts.view("list_head", machine.space, machine.symbol("klp_patches"))
        return [each.address_ for each in list_for_each_entry(head, "klp_patch", "list")]
