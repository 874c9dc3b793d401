"""When two runs have come to the same state, by value: whatever they do from there on is the same.

A state is made of

- guest memory: the pages that are not what they were when the exploration began, and which frames are mapped;
- the registers of each vCPU that is in the middle of guest code;
- the emulator's own objects (emu/tracked.py), by value: objects that were there at the beginning are named by
  their number, all others are described, as far as anything that was there leads to them;
- where each service stands that waits at a door.  Its local variables cannot be looked at.  But a service is
  deterministic: what it began with is described (the function and what that refers to), and it has seen the
  same values since (`Footprint.seen`), of calls that are over their results (emu/returned_calls.py);
- virtual time, to the instruction, and the timers.

Objects that services see and that were not there at the beginning are named by the step that has made them
(emu/happens_before.py).

Not looked at, because nobody decides by it: how many instructions a call may still execute (the bound of a
run that does not end), the events that were recorded, the time stamps of the log, the numbers of checks.
"""

import types
from collections import deque
from collections.abc import Callable, Iterable
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import greenlet

from emu.footprint import PAGE_SHIFT, Footprint, Recorder
from emu.memory import PAGE_SIZE
from emu.returned_calls import ReturnedCalls
from emu.task import Activity, Service
from emu.tracked import LEFT_OUT, Tracking
from emu.view import Struct

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = ["SameState"]

# Of a part of an object that was there at the beginning: its value, the ids of what was described for it, and
# what of that can change without anybody being told, with what it was.
_Part = tuple[int, tuple[int, ...], list[tuple[Any, int]]]

_SCALARS: Final = (int, str, bytes, float, bool, type(None), type, Enum, BaseException, types.ModuleType)
# How much a call may still execute is a bound; checks are only counted.
_BOUNDS: Final = frozenset({"budget", "_checks", "_greenlet", "_running", "_current"})
_MASK: Final = (1 << 64) - 1


class SameState:
    """The state of one machine, as seen by a recorder whose tracking has met all that there is now.

    `judged` gives what else somebody goes by who looks at the machine.
    """

    def __init__(
        self,
        machine: "Machine",
        recorder: Recorder,
        tracking: Tracking,
        judged: Callable[[], Any] = lambda: None,
    ) -> None:
        self._machine = machine
        self._recorder = recorder
        self._judged = judged
        arena = machine.space.arena
        self._original = [(at, arena.bytes[at.start : at.stop]) for at in arena.in_use()]
        self._pages: dict[int, int] = {}
        self._memory = 0
        self._mapping = 0
        self._known = tracking.known()
        self._numbers = {
            id(each): number for number, each in enumerate(self._known) if not isinstance(each, Activity)
        }
        # They are looked at task by task, and nobody goes by the time stamps of the log.
        for each in machine.hub.tasks:
            del self._numbers[id(object.__getattribute__(each, "activities"))]
        del self._numbers[id(machine.log.stamps)]
        self._parts: dict[tuple[Any, ...], _Part | None] = {}
        self._leads_to: dict[int, set[tuple[Any, ...]]] = {}  # by id, the parts of which it is described
        self._names: dict[int, int] = {}  # of objects that were met since, for those who see them
        self._unnamed: list[int] = []
        self._continuations: dict[int, tuple[Service | None, int]] = {}
        self._described: dict[int, int] = {}
        self._fixed: dict[int, tuple[tuple[Any, ...], int]] = {}
        self._is_plain = self._is_steady = True
        self._leaves: list[tuple[Any, int]] = []
        recorder.shown, recorder.met = self._shown, self._meet
        self.returned_calls = ReturnedCalls(
            recorder, self._shown, lambda value: self._numbers.get(id(value)), _form_of, _members_of
        )

    # What happens.

    def seen(self, service: Service | None) -> int:
        """What the service has seen so far, before its next step."""
        return self._continuations.get(id(service), (service, 0))[1]

    def step(self, number: int, step: Footprint, service: Service | None) -> None:
        """A step is over that has this number (emu/happens_before.py), and was the service's."""
        self._name(number)
        if service is None:
            return
        if service.finished:
            self._continuations.pop(id(service), None)
        else:
            self._continuations[id(service)] = service, hash(("at a door", step.seen))

    def _name(self, number: int) -> None:
        for index, each in enumerate(self._unnamed):
            self._names[each] = hash((number, index))
        self._unnamed.clear()

    def _meet(self, number: int) -> None:
        self._names[number] = hash(("new", len(self._unnamed)))
        self._unnamed.append(number)

    def _shown(self, value: Any) -> int:
        """A number for a value that a service sees."""
        kind = type(value)
        form = _FORMS.get(kind) or _form_of(kind)
        if form == "scalar":
            return _scalar(value)
        if form == "struct":
            return hash((value.layout_.name, value.address_))
        number = self._numbers.get(id(value))
        if number is not None:
            return hash(("there", number))
        if form == "tuple":
            met = self._names.get(id(value)) if len(value) > 4 else None
            return hash(tuple(map(self._shown, value))) if met is None else met
        if form == "greenlet":  # the service's own
            return hash(form)
        if issubclass(kind, Activity):
            return self._shown_activity(value)
        return self._names.get(id(value), 0)

    def _shown_activity(self, activity: Activity) -> int:
        """What a task is doing is named by the task and the level."""
        for task in self._machine.hub.tasks:
            for level, each in enumerate(list.__iter__(object.__getattribute__(task, "activities"))):
                if each is activity:
                    return hash((task.struct, level))
        return self._names.get(id(activity), 1)

    # The state.

    def number(self) -> int:
        """A number for the state that the machine is in; no step may be under way."""
        self._name(hash(("outside", self._memory)))
        self._described.clear()
        found = (
            self._look_at_memory(),
            self._look_at_objects(),
            self._look_at_registers(),
            self._look_at_time(),
        )
        return hash(found) & _MASK

    def _look_at_memory(self) -> int:
        space, recorder = self._machine.space, self._recorder
        memory = space.arena.bytes
        for page in recorder.pages:
            at = page << PAGE_SHIFT
            data = memory[at : at + PAGE_SIZE]
            value = 0 if data == self._was(at) else hash((page, data))
            self._memory += value - self._pages.get(page, 0)
            self._pages[page] = value
        recorder.pages.clear()
        if recorder.mapped:
            self._mapping = hash((frozenset(space._frames.items()), frozenset(space._access.items())))
            recorder.mapped = False
        arena = space.arena
        free = (arena._writable_end, arena._image_start, *arena._free, 0, *arena._free_images)
        return hash((self._memory, self._mapping, free))

    def _was(self, at: int) -> bytes:
        for extent, contents in self._original:
            if at in extent:
                return contents[at - extent.start : at - extent.start + PAGE_SIZE]
        return bytes(PAGE_SIZE)

    def _look_at_registers(self) -> int:
        found: list[Any] = []
        for rq in self._machine.sched.runqueues:
            curr = rq.curr
            if curr.context is None and curr.in_guest:
                found += [tuple(rq.cpu.registers().values()), rq.cpu.vectors()]
            else:
                found.append(None)
        return hash(tuple(found))

    def _look_at_time(self) -> int:
        timers = self._machine.timers
        pending = [each for each in sorted(timers._heap) if each.pending]
        functions = [(each.expires, each.what, self._value(each.function)) for each in pending]
        return hash((timers.now, timers._spent, *functions))

    def _look_at_objects(self) -> int:
        self._note_changes()
        first: dict[int, int] = {}
        found: list[Any] = []
        for part, known in self._parts.items():
            if known is None or any(_leaf(leaf) != was for leaf, was in known[2]):
                known = self._look_at(part)
            found.append(known[0])
            for each in known[1]:  # what two of them lead to is the same object
                found.append(first.setdefault(each, len(first)))
        self._described = first
        hub = self._machine.hub
        found.append(hash(tuple(map(repr, hub._failures))))
        for task in hub.tasks:
            found.append(self._contents(object.__getattribute__(task, "activities")))
        found.append(self._value(self._judged()))
        return hash(tuple(found))

    def _note_changes(self) -> None:
        """What was found about parts of objects that have changed since is forgotten."""
        numbers, parts, is_new = self._numbers, self._parts, False
        for part in self._recorder.changed:
            if part[0] in numbers:
                is_new |= part not in parts
                parts[part] = None
            for each in self._leads_to.pop(part[0], ()):
                parts[each] = None
        self._recorder.changed.clear()
        if is_new:
            ordered = sorted(parts, key=lambda part: (numbers[part[0]], *part[1:]))
            self._parts = {part: parts[part] for part in ordered}

    def _look_at(self, part: tuple[Any, ...]) -> _Part:
        number = self._numbers[part[0]]
        owner = self._known[number]
        self._is_steady, self._described, self._leaves = True, {}, []
        if len(part) == 1:
            value = hash((number, self._contents(owner)))
        else:
            value = hash((number, part[1], self._value(object.__getattribute__(owner, part[1]))))
        found = value, tuple(self._described), self._leaves
        if self._is_steady:
            self._parts[part] = found
            for each in found[1]:
                self._leads_to.setdefault(each, set()).add(part)
        return found

    # Describing.

    def _value(self, value: Any) -> int:
        kind = type(value)
        form = _FORMS.get(kind) or _form_of(kind)
        if form == "scalar":
            return _scalar(value)
        if form == "struct":
            return hash((value.layout_.name, value.address_))
        number = self._numbers.get(id(value))
        if number is not None:
            return hash(("there", number))
        if form == "tuple":
            return self._tuple(value)
        self._is_plain = False
        number = self._described.get(id(value))
        if number is not None:
            return hash(("described", number))
        self._described[id(value)] = len(self._described)
        return self._contents(value)

    def _tuple(self, value: tuple[Any, ...]) -> int:
        """One that holds nothing that can change is looked at once."""
        fixed = self._fixed.get(id(value))
        if fixed is not None:
            return fixed[1]
        was_plain, self._is_plain = self._is_plain, True
        found = hash(tuple(map(self._value, value)))
        if self._is_plain:
            self._fixed[id(value)] = value, found
        self._is_plain = self._is_plain and was_plain
        return found

    def _contents(self, value: Any) -> int:
        kind = type(value)
        match _FORMS.get(kind) or _form_of(kind):
            case "object":
                return self._object(value)
            case "dict":
                self._is_steady &= kind is not dict
                return self._all("dict", (x for pair in dict.items(value) for x in pair))
            case "list":
                self._is_steady &= kind is not list
                return self._all("list", list.__iter__(value))
            case "deque":
                self._is_steady &= kind is not deque
                return self._all("deque", deque.__iter__(value))
            case "set":
                self._is_steady &= kind is not set
                return hash(("set", sum(map(self._value, set.__iter__(value)))))
            case "frozenset":
                return hash(("frozenset", sum(map(self._value, value))))
            case "bytearray":
                self._leaves.append((value, leaf := _leaf(value)))
                return leaf
            case "mapping":  # of what nobody has any more to change it
                steady, plain = self._is_steady, self._is_plain
                mapped = self._all("mapping", (each for pair in value.items() for each in pair))
                self._is_steady, self._is_plain = steady, plain
                return mapped
            case "method":
                return hash((value.__func__.__qualname__, self._value(value.__self__)))
            case "partial":
                return self._all("partial", (value.func, *value.args, *value.keywords.items()))
            case "function":
                cells = [each.cell_contents for each in value.__closure__ or ()]
                if cells:
                    self._leaves.append((value, _leaf(value)))
                place = (value.__module__, value.__qualname__, value.__code__.co_firstlineno)
                return hash((place, *map(self._value, (*cells, *(value.__defaults__ or ())))))
            case "greenlet":
                return hash(("greenlet", bool(value)))
            case "left out":
                return hash(kind.__name__)
        return hash((kind.__name__, self._names.get(id(value), 0)))

    def _object(self, value: Any) -> int:
        kind = type(value)
        members, slots, is_steady = _MEMBERS.get(kind) or _members_of(kind)
        self._is_steady &= is_steady
        found: list[Any] = [kind.__name__]
        if members:
            for name, each in object.__getattribute__(value, "__dict__").items():
                if name not in _BOUNDS:
                    found += (name, self._value(each))
        for name in slots:
            try:
                found.append(self._value(object.__getattribute__(value, name)))
            except AttributeError:
                found.append(0)
        if kind.__name__ == "Service":
            found.append(self._continuations.get(id(value), (value, 0))[1])
        return hash(tuple(found))

    def _all(self, kind: str, values: Iterable[Any]) -> int:
        return hash((kind, *map(self._value, values)))


# By class: how its instances are described.
_FORMS: dict[type, str] = {}
_BUILT_IN: Final = (
    *(("scalar", each) for each in _SCALARS),
    *(("struct", Struct), ("tuple", tuple), ("dict", dict), ("list", list), ("deque", deque), ("set", set)),
    *(("frozenset", frozenset), ("bytearray", bytearray), ("mapping", types.MappingProxyType)),
    *(("method", types.MethodType), ("partial", partial), ("function", types.FunctionType)),
    ("greenlet", greenlet.greenlet),
)
_MEMBERS: dict[type, tuple[bool, tuple[str, ...], bool]] = {}


def _form_of(kind: type) -> str:
    if kind in _FORMS:
        return _FORMS[kind]
    form = next((form for form, each in _BUILT_IN if issubclass(kind, each)), "")
    if not form:
        is_ours = kind.__module__.split(".")[0] in ("emu", "patches", "klpemu")
        is_left_out = any(each.__name__ in LEFT_OUT for each in kind.__mro__)
        form = "left out" if is_left_out else "object" if is_ours else "foreign"
    _FORMS[kind] = form
    return form


def _members_of(kind: type) -> tuple[bool, tuple[str, ...], bool]:
    """Whether instances have a __dict__, their slots, and whether somebody is told when they change."""
    if kind in _MEMBERS:
        return _MEMBERS[kind]
    slots = [each.__dict__.get("__slots__", ()) for each in kind.__mro__]
    names = [name for each in slots for name in ((each,) if isinstance(each, str) else each)]
    names = [name for name in names if name not in _BOUNDS and not name.startswith("__")]
    frozen = getattr(kind, "__dataclass_params__", None)
    is_told = hasattr(kind, "is_tracked_") or bool(frozen and frozen.frozen)
    found = kind.__dictoffset__ != 0, tuple(names), is_told and not issubclass(kind, Activity)
    _MEMBERS[kind] = found
    return found


def _leaf(value: Any) -> int:
    """The value of a bytearray, or of the scalars that a function shares with others."""
    if isinstance(value, bytearray):
        return hash(bytes(value))
    cells = [each.cell_contents for each in value.__closure__]
    return hash(tuple(_scalar(each) for each in cells if type(each) in (int, bool, str, bytes, type(None))))


def _scalar(value: Any) -> int:
    """Python's own hash of an int forgets what is beyond 61 bits, and takes -1 for -2."""
    if type(value) is bytes:
        return hash(value)
    return hash((type(value).__name__, str(value)))
