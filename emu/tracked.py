"""Our own objects that kernel services share, made to tell who reads and who changes them.

A service is Python between two doors, and part of what it shares with others lies in Python objects: queues,
allocations, what a lookup finds.  `track` goes through everything that a root refers to.  Objects of the
emulator get a subclass of their class whose attributes report each access to the recorder, their lists,
dictionaries, sets and deques are replaced by ones that do the same.  What is put into a tracked object is
tracked from then on.

A tuple stands for each attribute of each object, and for each container.  A dictionary has one for each
key, too: a store under a key that is there already is seen by those who look this key up, and by those who
go through all of it.
"""

import types
from collections import deque
from collections.abc import Callable, Mapping
from enum import Enum
from functools import partial
from typing import Any, Final

from emu.footprint import Recorder

__all__ = ["LEFT_OUT", "Tracking"]

_ROOMS: Final = ("emu", "patches", "klpemu")
_SCALARS: Final = (int, str, bytes, float, bool, type(None), type, Enum, BaseException, types.ModuleType)

# Neither they nor what they hold decides what a task does next: registers and memory (which are recorded
# otherwise), what is only told, virtual time (whose passing counts as touching everything).
LEFT_OUT: Final = (
    *("VCpu", "Arena", "AddressSpace", "RecordingSpace", "Recorder", "EventTrace", "FlightRecorder"),
    *("Timers", "RecordingTimers", "Timeline", "Scenario", "Layouts", "Unwinder", "Image", "Struct"),
    *("SameState", "ReturnedCalls"),
)
# What counts its checks, or is the hub's own way of working.
_PRIVATE: Final = frozenset({"_checks", "_running", "_current", "_greenlet", "_failures", "activations"})

_TAKE: Final = frozenset(
    (
        "append",
        "appendleft",
        "extend",
        "extendleft",
        "insert",
        "__setitem__",
        "__iadd__",
        "setdefault",
        "update",
        "__ior__",
        "add",
    )
)
# What gives a service more than it returns.
_ALL_OF_IT: Final = frozenset(
    (
        *("__iter__", "__reversed__", "items", "values", "keys", "copy", "sort"),
        *("__eq__", "__le__", "__ge__", "__add__", "__or__", "__ror__", "__and__", "__rand__"),
        *("__sub__", "__rsub__", "union", "difference", "intersection"),
    )
)


class Tracking:
    """Tracks objects of one process on behalf of a recorder."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._classes: dict[type, type] = {}
        self._seen: dict[int, Any] = {}  # by id of what was there before; it also keeps that alive
        self._containers = _containers(recorder, self.track)

    def known(self) -> list[Any]:
        """All that was met so far, in the order in which that happened."""
        return [new for _, new in self._seen.values()]

    def track(self, root: Any) -> Any:
        """What to use in place of `root`: itself, or its tracked copy if it is a container."""
        waiting: list[Any] = []
        result = self._replacement(root, waiting)
        while waiting:
            self._contents(waiting.pop(), waiting)
        return result

    def _replacement(self, value: Any, waiting: list[Any]) -> Any:
        kind = type(value)
        if isinstance(value, _SCALARS):
            return value
        found = self._seen.get(id(value))
        if found is not None:
            return found[1]
        tracked = self._containers.get(kind)
        if tracked is not None:
            new = tracked(value, value.maxlen) if kind is deque else tracked(value)
            self._seen[id(value)] = (value, new)
            self._seen[id(new)] = (new, new)
            self._recorder.met(id(new))
            waiting.append(new)
            return new
        self._seen[id(value)] = (value, value)
        self._recorder.met(id(value))
        if kind.__module__.split(".")[0] in _ROOMS:
            if not any(each.__name__ in LEFT_OUT for each in kind.__mro__):
                waiting.append(value)
        elif isinstance(value, tuple | types.FunctionType | types.MethodType | partial):
            waiting.append(value)
        return value

    def _contents(self, value: Any, waiting: list[Any]) -> None:
        """Track what `value` holds, and then the object itself."""
        match value:
            case tuple():
                for each in value:
                    self._replacement(each, waiting)
            case types.MethodType():
                self._replacement(value.__self__, waiting)
            case partial():
                for each in (value.func, *value.args, *value.keywords.values()):
                    self._replacement(each, waiting)
            case types.FunctionType():
                for cell in value.__closure__ or ():
                    self._cell(cell, waiting)
            case dict():
                for key, each in list(dict.items(value)):
                    dict.__setitem__(value, key, self._replacement(each, waiting))
            case list():
                list.__setitem__(
                    value, slice(None), [self._replacement(x, waiting) for x in list.__iter__(value)]
                )
            case deque():
                for index, each in enumerate(list(deque.__iter__(value))):
                    deque.__setitem__(value, index, self._replacement(each, waiting))
            case set():
                for each in set.__iter__(value):
                    self._replacement(each, waiting)
            case _:
                self._members(value, waiting)

    def _cell(self, cell: Any, waiting: list[Any]) -> None:
        try:
            cell.cell_contents = self._replacement(cell.cell_contents, waiting)
        except ValueError:  # empty
            return

    def _members(self, value: Any, waiting: list[Any]) -> None:
        kind = type(value)
        for name in _member_names(value):
            try:
                held = object.__getattribute__(value, name)
            except AttributeError:
                continue
            new = self._replacement(held, waiting) if name not in _PRIVATE else held
            if new is not held:
                object.__setattr__(value, name, new)
        frozen = getattr(kind, "__dataclass_params__", None)
        if kind.__name__ != "Hub" and not (frozen is not None and frozen.frozen):
            value.__class__ = self._class_of(kind)

    def _class_of(self, kind: type) -> type:
        found = self._classes.get(kind)
        if found is None:
            found = self._classes[kind] = _tracked_class(kind, self._recorder, self.track)
            self._classes[found] = found
        return found


def _member_names(value: Any) -> list[str]:
    names = list(getattr(value, "__dict__", ()))
    for each in type(value).__mro__:
        slots = each.__dict__.get("__slots__", ())
        names += [slots] if isinstance(slots, str) else list(slots)
    return names


def _tracked_class(kind: Any, recorder: Recorder, track: Callable[[Any], Any]) -> type:
    """A subclass that tells which attributes of its instances are read and stored.

    What is found in the class itself, methods above all, does not change.
    """
    slots = {name for each in kind.__mro__ for name in each.__dict__.get("__slots__", ())}
    constant = {name for each in kind.__mro__ for name in each.__dict__} - slots | _PRIVATE

    def get(self: Any, name: str) -> Any:
        now = recorder.now
        if now is not None and name not in constant:
            now.reads.add((id(self), name))
            value = kind.__getattribute__(self, name)
            recorder.see(value)
            if isinstance(value, set):  # set(value) does not ask it for its members
                now.reads.add((id(value),))
                if recorder.sees:
                    recorder.see(str(sorted(map(recorder.shown, set.__iter__(value)))))
            return value
        return kind.__getattribute__(self, name)

    def store(self: Any, name: str, value: Any) -> None:
        if name not in constant:
            part = (id(self), name)
            recorder.changes(part)
            if recorder.now is not None:
                recorder.now.writes.add(part)
        kind.__setattr__(self, name, value if name in _PRIVATE else track(value))

    body = {"__slots__": (), "__getattribute__": get, "__setattr__": store, "is_tracked_": True}
    return type(kind.__name__, (kind,), body | {"__module__": kind.__module__})


def _containers(recorder: Recorder, track: Callable[[Any], Any]) -> dict[type, Any]:
    """By built-in type, its tracked subclass."""

    def number(container: Any, *key: Any) -> tuple[Any, ...]:
        return (id(container), *key)

    def wrapped(name: str, method: Any, touch: Callable[[Any, tuple[Any, ...]], None]) -> Any:
        takes, all_of_it = name in _TAKE, name in _ALL_OF_IT
        is_store = touch not in (reads, looks_up, goes_through)

        def wrapper(self: Any, *arguments: Any, **named: Any) -> Any:
            part = (id(self),)
            if is_store:
                recorder.changes(part)
            if recorder.now is None:
                if takes and arguments:
                    arguments = (*arguments[:-1], track(arguments[-1]))
                return method(self, *arguments, **named)
            touch(self, arguments)
            if takes and arguments:
                arguments = (*arguments[:-1], track(arguments[-1]))
            if not recorder.sees:
                return method(self, *arguments, **named)
            try:
                result = method(self, *arguments, **named)
            except (LookupError, ValueError) as error:
                recorder.see(type(error).__name__)
                raise
            if not all_of_it:
                recorder.see(result)
            elif part in recorder.ever_changed:
                see_all(self)
            return result

        return wrapper

    def see_all(container: Any) -> None:
        shown = recorder.shown
        match container:
            case dict():
                found = [shown(each) for pair in dict.items(container) for each in pair]
            case set():
                found = sorted(map(shown, set.__iter__(container)))
            case list():
                found = [*map(shown, list.__iter__(container))]
            case _:
                found = [*map(shown, deque.__iter__(container))]
        recorder.see(str(found))

    def reads(self: Any, _arguments: tuple[Any, ...]) -> None:
        assert recorder.now is not None
        recorder.now.reads.add(number(self))

    def writes(self: Any, _arguments: tuple[Any, ...]) -> None:
        assert recorder.now is not None
        recorder.now.writes.add(number(self))

    def looks_up(self: Any, arguments: tuple[Any, ...]) -> None:
        assert recorder.now is not None
        recorder.now.reads.add(number(self, 1, arguments[0]))

    def stores(self: Any, arguments: tuple[Any, ...]) -> None:
        """Two may store under two keys in either order; whoever goes through all sees both."""
        now = recorder.now
        assert now is not None
        now.writes.add(number(self, 1, arguments[0]))
        now.reads.add(number(self, 2))
        if not dict.__contains__(self, arguments[0]):
            now.writes.add(number(self))

    def takes_away(self: Any, arguments: tuple[Any, ...]) -> None:
        assert recorder.now is not None
        stores(self, arguments)
        recorder.now.writes.add(number(self))

    def goes_through(self: Any, _arguments: tuple[Any, ...]) -> None:
        assert recorder.now is not None
        recorder.now.reads.add(number(self))
        recorder.now.writes.add(number(self, 2))

    def changes_many(self: Any, arguments: tuple[Any, ...]) -> None:
        goes_through(self, ())
        for key in [*dict.keys(self), *(key for each in arguments for key in dict(each))]:
            takes_away(self, (key,))

    def made(kind: Any, touches: Mapping[str, Callable[[Any, tuple[Any, ...]], None]]) -> Any:
        body = {
            name: wrapped(name, getattr(kind, name), touch)
            for names, touch in touches.items()
            for name in names.split()
            if hasattr(kind, name)
        }
        return type(f"Tracked{kind.__name__}", (kind,), {"__slots__": (), "is_tracked_": True, **body})

    sequence = {
        "__iter__ __getitem__ __len__ __contains__ __reversed__ index count copy __eq__ __add__": reads,
        "append appendleft extend extendleft insert pop popleft remove clear rotate sort reverse": writes,
        "__setitem__ __delitem__ __iadd__": writes,
    }
    sets = {
        "__iter__ __len__ __contains__ __or__ __and__ __sub__ __le__ __ge__ __eq__ copy union": reads,
        "difference intersection issubset issuperset isdisjoint __ror__ __rand__ __rsub__": reads,
        "add discard remove pop clear update difference_update intersection_update": writes,
        "__ior__ __iand__ __isub__": writes,
    }
    mapping = {
        "__getitem__ get __contains__": looks_up,
        "__setitem__ setdefault": stores,
        "pop __delitem__": takes_away,
        "__iter__ __len__ items values keys __eq__ __or__ __ror__ __reversed__ copy": goes_through,
        "clear update popitem __ior__": changes_many,
    }
    return {
        list: made(list, sequence),
        deque: made(deque, sequence),
        set: made(set, sets),
        dict: made(dict, mapping),
    }
