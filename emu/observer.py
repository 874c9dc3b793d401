"""Watching which functions every task executes, by the basic blocks that its vCPU enters.

The observer says what happened; whether that may happen is for others to say.  An activation is one call of a
function that has not returned: it is known by the stack pointer at its first instruction, and it is over as
soon as a block begins with the stack pointer above.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
        self._sites: dict[int, int] = {}  # function to site
        self._behind: dict[int, int] = {}  # behind a site to function
        self._watched: set[int] = set()
        for cpu in machine.cpus:
            cpu.observe(partial(self._on_block, cpu.number))

    def watch(self, function: int, site: int | None) -> None:
        """Watch a function; `site` is its fentry site, if calls of it can be redirected there."""
        if site is None:
            self._watched.add(function)
        else:
            self._sites[function] = site
            self._behind[site + 5] = function

    def forget(self, start: int, end: int) -> None:
        """The code in [start, end) is gone."""
        for function, site in list(self._sites.items()):
            if start <= function < end:
                del self._sites[function], self._behind[site + 5]
        self._watched = {each for each in self._watched if not start <= each < end}

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
        if address in self._sites:
            first = self._machine.space.read(self._sites[address], 1)[0]
            if first not in (CALL, INT3):
                function = address
        elif address in self._watched:
            function = address
        else:
            function = self._behind.get(address)
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
