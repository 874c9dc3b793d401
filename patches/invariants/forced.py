"""A forced transition, judged by which patches it pins."""

from emu.events import Event, EventKind
from emu.machine import Machine
from emu.memory import read_string, read_u64
from emu.view import list_for_each_entry
from patches.invariants.finding import Finding
from patches.invariants.witness import Witness

__all__ = ["PINS", "ForcedPatches"]

PINS = "a_force_pins_what_it_removes"
KLP_UNPATCHED = 0


class ForcedPatches(Witness):
    """a_force_pins_what_it_removes: A patch is marked as forced, so that its module stays for ever, only
    while a transition is on that removes it: its own unpatching, or the patching of one that replaces it.

    Source: klp_force_transition() of 6.1; 2957308343fa ("livepatch: Don't block removal of patches that are
    safe to unload") (in v5.18).
    """

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine, PINS)
        self._forced = machine.layouts.offsetof("klp_patch", "forced")
        machine.events.listen(self._event, EventKind.STORE)

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
