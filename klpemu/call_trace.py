"""One executed call, explained: the functions it passes, and where each branch out of one led."""

from collections.abc import Sequence
from dataclasses import dataclass

from emu.assembly import Instruction
from klpemu.function_state import has_site
from klpemu.kernel import Kernel

__all__ = ["CallTrace", "TracedInstruction", "Visit", "call_trace"]


@dataclass(frozen=True, slots=True)
class TracedInstruction:
    """An executed instruction: its place as `sym+0x5/0x30 [mod]`, itself, and a comment, often empty."""

    place: str
    instruction: Instruction
    comment: str


@dataclass(frozen=True, slots=True)
class Visit:
    """Instructions executed one after the other in one function; `role` says what it is for, if known."""

    function: str
    role: str
    instructions: tuple[TracedInstruction, ...]


@dataclass(frozen=True, slots=True)
class CallTrace:
    """An executed call: its visits in order, and RAX."""

    visits: tuple[Visit, ...]
    returned: int

    @property
    def instructions(self) -> tuple[TracedInstruction, ...]:
        """Every executed instruction."""
        return tuple(each for visit in self.visits for each in visit.instructions)

    @property
    def functions(self) -> tuple[str, ...]:
        """The functions passed, by name, one entry a visit."""
        return tuple(visit.function for visit in self.visits)


def call_trace(kernel: Kernel, function: str, arguments: Sequence[int], *, att: bool = False) -> CallTrace:
    """Call a guest function and explain what was executed."""
    site = kernel.site_of(function)[0] if has_site(kernel, function) else 0
    roles = _Roles(kernel)
    trace = kernel.trace(function, *arguments, att=att)
    executed = list(trace.instructions)
    visits: list[Visit] = []
    instructions: list[TracedInstruction] = []
    places = [place for place, _ in executed]
    for (place, instruction), following in zip(executed, [*places[1:], ""], strict=True):
        name = place.partition("+")[0]
        comments = ["fentry site"] if instruction.address == site else []
        # A function that calls itself begins a new visit.
        leaves = following.partition("+")[0] != name or following.startswith(f"{name}+0x0/")
        if leaves and following:
            comments.append(f"-> {following}")
        instructions.append(TracedInstruction(place, instruction, ", ".join(comments)))
        if leaves:
            visits.append(Visit(name, roles.role_of(place), tuple(instructions)))
            instructions = []
    return CallTrace(tuple(visits), trace.result)


class _Roles:
    """What the functions on the way of a redirected call are for."""

    def __init__(self, kernel: Kernel) -> None:
        self._replacements = {
            kernel.machine.kallsyms.describe(address): each.patch.name
            for each in kernel.enabled
            for address in each.new_func.values()
        }

    def role_of(self, place: str) -> str:
        name, _, rest = place.partition("+")
        if rest.endswith("[__builtin__ftrace]"):
            return "private trampoline of one ftrace_ops"
        known = {
            "ftrace_caller": "common trampoline",
            "ftrace_regs_caller": "common trampoline, saves all registers",
            "arch_ftrace_ops_list_func": "asks every ops on ftrace_ops_list",
            "klp_ftrace_handler": "takes the func on top of func_stack",
        }
        if name in known:
            return known[name]
        size = rest.partition("/")[2]
        patch = self._replacements.get(f"{name}+0x0/{size}")
        return f"replacement, from patch {patch}" if patch else ""
