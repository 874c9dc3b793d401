"""What happened, in order: every store of a kernel service, every sync, every switch.

A test that asks "in which order did the kernel store these?" reads it here.  The trace keeps the last
`EVENTS_KEPT` events; `total` says how many there were.
"""

import enum
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

__all__ = ["EVENTS_KEPT", "Event", "EventKind", "EventTrace"]

EVENTS_KEPT = 1 << 16


class EventKind(enum.Enum):
    """What an event is."""

    STORE = "store"  # a service stored to data
    POKE = "poke"  # the text poker stored to text
    SYNC = "sync"  # every vCPU has passed the predicate named in `note`
    TRAP = "trap"  # a vCPU executed an int3
    EMULATE = "emulate"  # a breakpoint handler dealt with it
    SWITCH = "switch"  # a vCPU went from one task to another
    SWITCH_POINT = "switch point"  # the task at `address` may change its version of what is patched
    CALL = "call"  # a watched function was entered (emu/observer.py)

    __hash__ = object.__hash__  # there is one of each, and Enum's own is a call in Python


class Event(NamedTuple):
    """One event: a number that only grows, a guest virtual address, and a store's bytes before and after."""

    number: int
    kind: EventKind
    address: int = 0
    before: bytes = b""
    after: bytes = b""
    note: str = ""


_new = tuple.__new__
_STORE = EventKind.STORE


class EventTrace:
    """The events of one machine.  `listeners` are told of each, those of a kind (`listen`) after them."""

    def __init__(self) -> None:
        self.total = 0
        self._kept: deque[Event] = deque(maxlen=EVENTS_KEPT)
        self.listeners: list[Callable[[Event], None]] = []
        self.listeners_of: dict[EventKind, list[Callable[[Event], None]]] = {kind: [] for kind in EventKind}
        self.listeners_at: dict[int, list[Callable[[Event], None]]] = {}

    def listen_at(self, listener: Callable[[Event], None], address: int) -> None:
        """Tell `listener` of each store to exactly this guest virtual address from now on."""
        self.listeners_at.setdefault(address, []).append(listener)

    def listen(self, listener: Callable[[Event], None], *kinds: EventKind) -> None:
        """Tell `listener` of all events of these kinds from now on."""
        for kind in kinds:
            self.listeners_of[kind].append(listener)

    def record(
        self, kind: EventKind, address: int = 0, before: bytes = b"", after: bytes = b"", note: str = ""
    ) -> None:
        """Append one event."""
        self.total = total = self.total + 1
        # Not by Event(...): that is a call in Python, and there are hundreds of thousands of events.
        event = _new(Event, (total, kind, address, before, after, note))
        self._kept.append(event)
        for listener in self.listeners:
            listener(event)
        for listener in self.listeners_of[kind]:
            listener(event)
        if kind is _STORE and (listeners := self.listeners_at.get(address)) is not None:
            for listener in listeners:
                listener(event)

    def since(self, number: int) -> list[Event]:
        """Events recorded after event `number`, oldest first, as far as they are kept."""
        return [event for event in self._kept if event.number > number]

    def __iter__(self) -> Iterator[Event]:
        return iter(self._kept)
