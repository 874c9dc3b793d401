"""Watching which functions every task executes, by the basic blocks that its vCPU enters.

The observer says what happened; whether that may happen is for others to say.  An activation is one call of a
function that has not returned: it is known by the stack pointer at its first instruction, and it is over as
soon as a block begins with the stack pointer above.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING

from emu.task import GuestCall, Task

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = ["Activation", "Observer"]

CALL, INT3 = 0xE8, 0xCC


@dataclass(slots=True)
class Activation:
    """One call: the stack pointer at its entry, and the function whose body executes."""

    rsp: int
    function: int


class Observer:
    """Watches the vCPUs of one machine for good.

    `executed` is called with a task and the address of a function whose body it begins to execute: of one
    with a site when it goes on behind that site, of any other watched one at its first instruction.
    """

    def __init__(self, machine: "Machine", executed: Callable[[Task, int], None]) -> None:
        self._machine = machine
        self._executed = executed
        # By address, the function and its site, which decides whether the body begins here, or 0.
        self._watched: dict[int, tuple[int, int]] = {}
        self._settled: Mapping[int, tuple[int, int]] = {}
        for cpu in machine.cpus:
            cpu.observe(partial(self._on_block, cpu.number))

    def watch(self, function: int, site: int | None) -> None:
        """Watch a function; `site` is its fentry site, if calls of it can be redirected there."""
        self._watched[function] = function, site or 0
        if site is not None:
            self._watched[site + 5] = function, 0

    def settle(self) -> None:
        """What is watched now stays so: the kernel's own functions, which are many, never go."""
        self._settled = MappingProxyType({**self._settled, **self._watched})
        self._watched = {}

    def forget(self, start: int, end: int) -> None:
        """The code in [start, end) is gone."""
        for address, (function, _) in list(self._watched.items()):
            if start <= function < end:
                del self._watched[address]

    def activations(self, task: Task) -> list[Activation]:
        """The calls of watched functions that have not returned, outermost first."""
        calls = [each for each in task.activities if isinstance(each, GuestCall)]
        return [activation for call in calls for activation in call.activations]

    def _on_block(self, number: int, address: int) -> None:
        rq = self._machine.sched.runqueues[number]
        task = rq.curr
        function: int | None = None
        assert isinstance(task.top, GuestCall)
        live = task.top.activations
        found = self._settled.get(address) or self._watched.get(address)
        if found is not None and not (found[1] and self._machine.space.read(found[1], 1)[0] in (CALL, INT3)):
            function = found[0]
        if function is None and not live:
            return
        rsp = rq.cpu.stack_pointer()
        while live and live[-1].rsp < rsp:
            live.pop()
        if function is None:
            if live and live[-1].rsp == rsp and self._has_left(live[-1].function, address):
                live.pop()
            return
        if live and live[-1].rsp == rsp:
            if live[-1].function == function:
                return
            live[-1].function = function  # what a redirected call, or a tail call, goes on in
        else:
            live.append(Activation(rsp, function))
        self._executed(task, function)

    def _has_left(self, function: int, address: int) -> bool:
        """A function is over that has jumped, with nothing left on the stack, to one that nobody watches.

        Its cold part is still the function.
        """
        mine, other = (self._machine.kallsyms.at(each) for each in (function, address))
        if mine is None or other is None:
            return False
        return other.address != mine.address and not other.name.startswith(f"{mine.name}.cold")
