"""Atomic replace, judged by when the replaced patches go."""

from typing import Any

from emu.events import Event
from emu.machine import Machine
from emu.view import list_for_each_entry
from patches.invariants.finding import Finding
from patches.invariants.witness import Witness

__all__ = ["STAY", "ReplacedPatches"]

STAY = "replaced_patches_stay_to_the_end"


class ReplacedPatches(Witness):
    """replaced_patches_stay_to_the_end: A patch that was on klp_patches when a transition of a newer one
    began is on it until that transition is over.

    Source: klp_try_complete_transition() of 6.1, which frees them behind klp_complete_transition();
    "livepatch: Keep replaced patches until post_patch callback is called" (in v5.5).
    """

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine, STAY)
        self._at = machine.symbol("klp_transition_patch")
        self._before: list[int] = []
        machine.events.listen_at(self._event, self._at)

    def _event(self, event: Event) -> None:
        patch = int.from_bytes(event.after, "little")
        listed = [each.address_ for each in self._listed()]
        if patch:
            self._before = listed[: listed.index(patch)] if patch in listed else []
            return
        self._checks += 1
        gone = len([each for each in self._before if each not in listed])
        self._before = []
        if gone:
            what = f"{gone} of the older patches had left klp_patches before the transition was over"
            self._findings.append(Finding(STAY, what))

    def _listed(self) -> list[Any]:
        machine = self._machine
        head = machine.layouts.view("list_head", machine.space, machine.symbol("klp_patches"))
        return list(list_for_each_entry(head, "klp_patch", "list"))
