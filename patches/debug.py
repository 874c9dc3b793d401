"""The pr_debug() callsites of kernel/livepatch/transition.c, at their lines in v6.1."""

from typing import Final

from emu.dynamic_debug import Callsite

__all__ = ["CALLSITES", "CANCELING", "COMPLETING", "INITIALIZING", "REVERSING", "switch_callsite"]


def _at(line: int, function: str, text: str) -> Callsite:
    return Callsite("kernel/livepatch/transition.c", line, "livepatch", function, f"livepatch: {text}\n")


COMPLETING: Final = _at(75, "klp_complete_transition", "'%s': completing %s transition")
CANCELING: Final = _at(148, "klp_cancel_transition", "'%s': canceling patching transition, going to unpatch")
_RUNNING: Final = _at(316, "klp_try_switch_task", "%s: %s:%d is running")
_UNRELIABLE: Final = _at(320, "klp_try_switch_task", "%s: %s:%d has an unreliable stack")
_SLEEPING: Final = _at(324, "klp_try_switch_task", "%s: %s:%d is sleeping on function %s")
_UNKNOWN: Final = _at(329, "klp_try_switch_task", "%s: Unknown error code (%d) when trying to switch %s:%d")
INITIALIZING: Final = _at(521, "klp_init_transition", "'%s': initializing %s transition")
REVERSING: Final = _at(582, "klp_reverse_transition", "'%s': reversing transition from %s")

CALLSITES: Final = (
    COMPLETING,
    CANCELING,
    _RUNNING,
    _UNRELIABLE,
    _SLEEPING,
    _UNKNOWN,
    INITIALIZING,
    REVERSING,
)


def switch_callsite(problem: str) -> Callsite:
    """Which callsite of klp_try_switch_task() says that a task could not switch, because of `problem`."""
    if problem == "is running":
        return _RUNNING
    return _SLEEPING if problem.startswith("is sleeping on function") else _UNRELIABLE
