"""Who is told of which events."""

from emu.events import Event, EventKind, EventTrace


def test_a_listener_of_a_kind_is_told_of_no_other() -> None:
    trace = EventTrace()
    heard: list[Event] = []
    trace.listen(heard.append, EventKind.SYNC, EventKind.POKE)
    for kind in EventKind:
        trace.record(kind, 8)
    assert [each.kind for each in heard] == [EventKind.POKE, EventKind.SYNC]


def test_a_listener_at_an_address_is_told_of_the_stores_to_it_only() -> None:
    trace = EventTrace()
    heard: list[Event] = []
    trace.listen_at(heard.append, 0x1000)
    trace.record(EventKind.STORE, 0x1008, b"\0", b"\1")
    trace.record(EventKind.POKE, 0x1000, b"\0", b"\1")
    trace.record(EventKind.STORE, 0x1000, b"\0", b"\2")
    assert heard == [Event(3, EventKind.STORE, 0x1000, b"\0", b"\2")]
