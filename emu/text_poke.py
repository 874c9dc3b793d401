"""Changing text that may be running: the breakpoint protocol of arch/x86/kernel/alternative.c.

A poke of a site is three stores with a sync of all CPUs behind each: `int3` on the first byte, the tail of
the new instruction, its first byte.  Sites queued together go through each stage together, in address order.
Whoever executes the `int3` meanwhile is sent where the *new* instruction would have sent it.

While an object is loaded nothing can execute its text yet: its sites are converted before its pages exist,
without the poker.
"""

from collections.abc import Callable
from dataclasses import dataclass

from elf.errors import KlpemuError
from emu.events import EventKind, EventTrace
from emu.paging import AddressSpace

__all__ = ["CALL_OPCODE", "INSN_SIZE", "INT3", "JMP32_OPCODE", "NOP5", "TextPoker", "text_gen_insn"]

INT3 = 0xCC
CALL_OPCODE = 0xE8
JMP32_OPCODE = 0xE9
NOP5 = bytes.fromhex("0f1f440000")
INSN_SIZE = 5
TP_VEC_MAX = 256  # PAGE_SIZE / sizeof(struct text_poke_loc)


def text_gen_insn(opcode: int, address: int, target: int) -> bytes:
    """`call rel32` or `jmp rel32` at `address` to `target` (SDM Vol. 2A, CALL; Vol. 2B, JMP)."""
    displacement = target - (address + INSN_SIZE)
    displacement = (displacement + (1 << 63)) % (1 << 64) - (1 << 63)
    if not -(1 << 31) <= displacement < 1 << 31:
        raise KlpemuError(
            f"{target:#x} is out of reach of a 5-byte instruction",
            where=f"{address:#018x}",
            advice="text must lie within 2 GiB of what it calls",
        )
    return bytes([opcode]) + displacement.to_bytes(4, "little", signed=True)


@dataclass(eq=False, slots=True)
class TextPokeLoc:
    """One site of a batch (struct text_poke_loc): where, and the instruction that will stand there."""

    address: int
    text: bytes
    old: int = 0


class TextPoker:
    """The only writer of text once code may run.

    `sync` waits until every vCPU has passed an interruptible boundary; `door` is where another task may go on
    between two stores.
    """

    def __init__(
        self,
        space: AddressSpace,
        events: EventTrace,
        sync: Callable[[str], None],
        door: Callable[[str, int], None],
    ) -> None:
        self._space = space
        self._events = events
        self._sync = sync
        self._door = door
        self._queue: list[TextPokeLoc] = []
        self._patching: list[TextPokeLoc] = []  # bp_desc: what poke_int3_handler() looks at

    def text_poke(self, address: int, data: bytes) -> None:
        """One store, without breakpoint and sync: nothing can be executing these bytes yet."""
        self._store(address, data, "text_poke")

    def text_poke_queue(self, address: int, text: bytes) -> None:
        """Add a site to the batch; the batch goes out first if it is full or would lose its order."""
        if len(self._queue) == TP_VEC_MAX or (self._queue and self._queue[-1].address > address):
            self.text_poke_finish()
        self._queue.append(self._location(address, text))

    def text_poke_finish(self) -> None:
        """Poke all that is queued."""
        if self._queue:
            batch, self._queue = self._queue, []
            self._text_poke_bp_batch(batch)

    def text_poke_bp(self, address: int, text: bytes) -> None:
        """Poke one site, after all that is queued."""
        self.text_poke_finish()
        self._text_poke_bp_batch([self._location(address, text)])

    def poke_int3_handler(self, registers: dict[str, int], push: Callable[[int], None]) -> bool:
        """Emulate the new instruction for a CPU that executed one of our `int3`s; False if it is not ours.

        `registers["rip"]` is past the `int3`.  A call pushes its return address with `push`; nothing else but
        RIP (and RSP by that push) changes.
        """
        address = registers["rip"] - 1
        site = next((each for each in self._patching if each.address == address), None)
        if site is None:
            return False
        behind = address + len(site.text)
        displacement = int.from_bytes(site.text[1:], "little", signed=True)
        match site.text[0]:
            case 0xE8:
                push(behind)
                registers["rip"] = behind + displacement
            case 0xE9:
                registers["rip"] = behind + displacement
            case _:
                registers["rip"] = behind
        return True

    def _location(self, address: int, text: bytes) -> TextPokeLoc:
        if text != NOP5 and not (len(text) == INSN_SIZE and text[0] in (CALL_OPCODE, JMP32_OPCODE)):
            raise KlpemuError(
                f"the breakpoint handler could not emulate {text.hex(' ')}",
                where=f"{address:#018x}",
                advice="poke a 5-byte call, jmp or NOP",
            )
        return TextPokeLoc(address, text)

    def _text_poke_bp_batch(self, batch: list[TextPokeLoc]) -> None:
        self._patching = batch
        for site in batch:
            site.old = self._space.read(site.address, 1)[0]
            self._store(site.address, bytes([INT3]), "phase 1")
        self._sync("text_poke_sync")
        for site in batch:
            self._store(site.address + 1, site.text[1:], "phase 2")
        self._sync("text_poke_sync")
        for site in batch:
            self._store(site.address, site.text[:1], "phase 3")
        self._sync("text_poke_sync")
        self._patching = []

    def _store(self, address: int, data: bytes, note: str) -> None:
        self._door("poke", address)
        before = self._space.read(address, len(data))
        self._space.write(address, data)
        self._events.record(EventKind.POKE, address, before, data, note)
