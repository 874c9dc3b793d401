"""Which basic block was entered behind which: what a search by coverage calls edges."""

from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = ["BlockEdges"]


class BlockEdges:
    """Watches the vCPUs of one machine for good.

    `entered` are pairs of guest virtual addresses: a block, and the one that the same vCPU entered next.
    Whoever has looked at them clears them.  An interrupt or a service in between is part of an edge.
    """

    def __init__(self, machine: "Machine") -> None:
        self.entered: set[tuple[int, int]] = set()
        self._last = [0] * len(machine.cpus)
        for cpu in machine.cpus:
            cpu.observe(partial(self._on_block, cpu.number))

    def _on_block(self, number: int, address: int) -> None:
        self.entered.add((self._last[number], address))
        self._last[number] = address
