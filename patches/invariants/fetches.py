"""While text changes: what any CPU may fetch, judged from the stores of the text poker and its syncs."""

from emu.cross_modifying import INT3, SYNC, Store, check_change
from emu.events import Event, EventKind
from emu.machine import Machine
from patches.invariants.finding import Finding
from patches.invariants.witness import Witness

__all__ = ["FETCH", "FetchedText"]

INSN_SIZE = 5  # of a site: a NOP, a call or a jump
FETCH = "every_fetch_is_an_instruction"
# What makes every CPU serialise: an IPI whose handler does.
SERIALISES = "text_poke_sync"
UNUSED = "text_poke"  # a store to text that nothing can be executing yet


class _Change:
    """A site from the first store to it until it is whole again and everybody has seen that."""

    def __init__(self, before: bytes) -> None:
        self.old = before
        self.now = bytearray(before)
        self.stores: list[Store | None] = []


class FetchedText(Witness):
    """every_fetch_is_an_instruction: At each moment of each poke, whatever a CPU may fetch that has not
    serialised since the last store is the old instruction, the new one, or the breakpoint.

    Source: our model of the SDM, Vol. 3A, "Handling Self- and Cross-Modifying Code" (emu/cross_modifying.py);
    text_poke_bp_batch() of arch/x86/kernel/alternative.c.
    """

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine, FETCH)
        self._changes: dict[int, _Change] = {}
        self._calls = [machine.symbol(name) for name in ("ftrace_call", "ftrace_regs_call")]
        machine.events.listen(self._event, EventKind.POKE, EventKind.SYNC)

    def _event(self, event: Event) -> None:
        if event.kind is EventKind.POKE and event.note != UNUSED:
            self._store(event)
        elif event.kind is EventKind.SYNC and event.note == SERIALISES:
            for change in self._changes.values():
                change.stores.append(SYNC)
            self._end_changes()

    def _store(self, event: Event) -> None:
        site = self._site_of(event.address)
        change = self._changes.get(site)
        if change is None:
            now = bytearray(self._machine.space.read(site, INSN_SIZE))
            at = event.address - site
            now[at : at + len(event.before)] = event.before
            change = self._changes[site] = _Change(bytes(now))
        at = event.address - site
        change.now[at : at + len(event.after)] = event.after
        change.stores.append(Store(at, event.after))

    def _site_of(self, address: int) -> int:
        """Where the instruction begins that a store goes into: a site, or a call in a common trampoline."""
        for call in self._calls:
            if call <= address < call + INSN_SIZE:
                return call
        record = self._machine.ftrace.records.lookup_rec(address - INSN_SIZE + 1, address)
        return address if record is None else int(record.ip)

    def _end_changes(self) -> None:
        for site, change in list(self._changes.items()):
            if change.now[0] == INT3 or _is_half_done(change):
                continue
            del self._changes[site]
            self._judge(site, change)

    def _judge(self, site: int, change: _Change) -> None:
        self._checks += 1
        new = bytes(change.now)
        for fetch in check_change(change.old, new, change.stores)[:1]:
            what = (
                f"a CPU that has not serialised may fetch {fetch.data.hex(' ')}, "
                f"which is neither {change.old.hex(' ')} nor {new.hex(' ')} nor an int3"
            )
            at, place = site + fetch.offset, self._machine.kallsyms.describe(site + fetch.offset)
            self._findings.append(
                Finding(FETCH, what, at, place, new[fetch.offset :], fetch.data, is_code=True)
            )


def _is_half_done(change: _Change) -> bool:
    """Only the tail was stored yet."""
    return all(store.offset for store in change.stores if store is not None)
