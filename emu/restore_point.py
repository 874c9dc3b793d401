"""Putting a whole machine back to an earlier moment: guest memory, vCPUs, and the Python objects around them.

A run of a search costs milliseconds and a boot hundreds, so runs begin from a restore point.  What has no
place in guest memory lies in some hundred small Python objects.  They are found by walking everything that
the roots refer to; each container and each object with members gets its contents back in place, so that
whoever holds a reference to one still holds the right one.

A suspended greenlet cannot be copied: there is no restore point while a service waits at its door.
"""

import copy
import mmap
import types
from collections import deque
from collections.abc import Callable, Collection, Iterable
from enum import Enum
from functools import partial
from operator import attrgetter, is_
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Final
from weakref import finalize

import greenlet

from elf.errors import KlpemuError
from elf.image import Image
from elf.layout import StructLayout
from elf.unwind_row import UnwindRow
from emu.cpu import BlockHooks
from emu.events import Event
from emu.kallsyms import Ksym, SymbolTable
from emu.memory import PAGE_SIZE
from emu.module import LoadedObject
from emu.placement import Placement
from emu.remembered import Remembered
from emu.task import Service, Task
from emu.view import Layouts, Struct
from emu.vmlinux import Vmlinux

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = ["RestorePoint", "Suspended"]

# What nobody changes once it is made, and memory that is copied otherwise.
_FIXED: Final = (
    *(int, str, bytes, float, bool, type(None), type, Enum, range, mmap.mmap, memoryview, finalize),
    *(types.ModuleType, types.BuiltinFunctionType, types.CodeType, BaseException, PurePath),
    *(BlockHooks, Image, StructLayout, Layouts, Event, Ksym, SymbolTable, Struct, UnwindRow, Vmlinux),
    Remembered,
)
_FOREIGN: Final = ("unicorn.", "ctypes", "_ctypes", "_struct")
_ITERATORS: Final[tuple[type, ...]] = (type(iter(range(0))), type(iter(())), type(iter([])))
_iterators: Final = frozenset(_ITERATORS)
_NOTHING: Final = object()
_fixed: Final[set[type]] = {type(_NOTHING)}  # the types that were seen to be such
_known: Final[dict[type, "Restorer"]] = {}  # and how the others are put back


class Suspended(KlpemuError):  # noqa: N818  (said of a service)
    """A service waits at its door, and cannot be copied there."""


class RestorePoint:
    """One moment of a machine, to which it can be put back any number of times.

    `roots` are objects that belong to the machine and are not reached from it, such as a Kernel.  Raises
    `Suspended` while a service is under way.
    """

    def __init__(self, machine: "Machine", *roots: object) -> None:
        self._machine = machine
        arena = machine.space.arena
        self._contents = arena.written.take(arena.in_use())
        self._objects = _Kept((machine, *roots))
        self._executable = dict(machine.space.executable())
        self._cpus = [(cpu, cpu.context()) for cpu in (*machine.cpus, machine.tracer)]

    @property
    def size(self) -> int:
        """Bytes of guest memory that were copied."""
        return self._contents.size

    def restore(self) -> None:
        """Put the machine back; nothing of it may be running."""
        machine = self._machine
        for task in _tasks(machine):
            machine.hub.drop_services(task)
        arena = machine.space.arena
        written = arena.written.written(arena.in_use())
        self._drop_changed_text(written)
        arena.written.put(self._contents, written)
        self._objects.put_back()
        for cpu, context in self._cpus:
            cpu.set_context(context)
        machine.space.flush_tlb()

    def _drop_changed_text(self, written: Iterable[range]) -> None:
        """Forget the translations of pages that hold other code now, while they are still mapped."""
        space, contents = self._machine.space, self._contents
        now = dict(space.executable())
        changed = {page for page, _ in now.items() ^ self._executable.items()}
        touched = contents.pages.union(*written)
        for page, frame in now.items():
            number = frame // PAGE_SIZE
            if page not in changed and number in touched:
                before = contents.page(number) or space.arena.written.base(number)
                if space.arena.bytes[frame : frame + PAGE_SIZE] == before:
                    continue
            elif page not in changed:
                continue
            space.drop_translations(page << 12, PAGE_SIZE)


def _tasks(machine: "Machine") -> Iterable[Task]:
    idle = (rq.idle for rq in machine.sched.runqueues)
    return dict.fromkeys((*machine.tasks, *machine.by_struct.values(), *idle))


# The objects.


class _Kept:
    """What the objects contained, sorted by how it is put back."""

    def __init__(self, roots: Iterable[object]) -> None:
        self._dicts: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self._lists: list[tuple[list[Any], list[Any]]] = []
        self._slots: list[tuple[Any, Callable[[Any], tuple[Any, ...]], tuple[str, ...], tuple[Any, ...]]] = []
        self._others: list[Callable[[], None]] = []
        self._take(roots)

    def put_back(self) -> None:
        """Give each object its contents again."""
        for target, contents in self._dicts:
            target.clear()
            target.update(contents)
        for elements, before in self._lists:
            elements[:] = before
        for each, values_of, names, values in self._slots:
            try:
                if all(map(is_, values_of(each), values)):
                    continue
            except AttributeError:  # one has gone
                pass
            for name, value in zip(names, values, strict=True):
                setattr(each, name, value)
        for restore in self._others:
            restore()

    def _take(self, roots: Iterable[object]) -> None:
        seen: dict[int, object] = {}
        waiting = list(roots)
        while waiting:
            each = waiting.pop()
            if id(each) in seen:
                continue
            kind = type(each)
            restorer = _known.get(kind)
            if restorer is None:
                if kind in _fixed:
                    continue
                restorer = _restorer_of(kind)
                if restorer is None:
                    _fixed.add(kind)
                    continue
            seen[id(each)] = each  # kept alive, so that no other object gets its number
            restorer(each, waiting, self)

    def keep_dict(self, target: dict[Any, Any]) -> bool:
        """Copy a dictionary; whether all its values are of types that never change."""
        if _fixed.issuperset(map(type, target.values())):
            self._dicts.append((target, target.copy()))
            return True
        if not _iterators.isdisjoint(map(type, target.values())):
            iterators = tuple(key for key, value in target.items() if type(value) in _iterators)
            contents = target | {key: copy.copy(target[key]) for key in iterators}
            self._others.append(partial(_put_dict, target, contents, iterators))
        else:
            self._dicts.append((target, target.copy()))
        return False

    def keep_list(self, target: list[Any]) -> None:
        """Copy a list."""
        self._lists.append((target, target.copy()))

    def keep_slots(
        self,
        target: Any,
        values_of: Callable[[Any], tuple[Any, ...]],
        names: tuple[str, ...],
        values: tuple[Any, ...],
    ) -> None:
        """Note the values of all slots, as `values_of` gives them."""
        self._slots.append((target, values_of, names, values))

    def keep(self, restore: Callable[[], None]) -> None:
        """Note what puts back any other object."""
        self._others.append(restore)


# Takes one object; what it refers to is appended to the list.
Restorer = Callable[[Any, list[object], _Kept], None]


def _restorer_of(kind: type) -> Restorer | None:
    """How objects of a type are put back; None if there is nothing about them that changes."""
    if issubclass(kind, _FIXED) or kind.__module__.startswith(_FOREIGN):
        return None
    found = next((restorer for types_, restorer in _RESTORERS if issubclass(kind, types_)), None)
    found = _known[kind] = found or _members_of(kind)
    return found


def _changing(values: Collection[object]) -> Iterable[object]:
    """Those that have to be looked at; most are numbers and names."""
    if _fixed.issuperset(map(type, values)):
        return ()
    return [each for each in values if type(each) not in _fixed]


def _dict(each: dict[Any, Any], waiting: list[object], kept: _Kept) -> None:
    waiting += _changing(each)  # its keys
    if not kept.keep_dict(each):
        waiting += [value for value in each.values() if type(value) not in _fixed]


def _list(each: list[Any], waiting: list[object], kept: _Kept) -> None:
    waiting += _changing(each)
    kept.keep_list(each)


def _unordered(each: Any, waiting: list[object], kept: _Kept) -> None:
    waiting += _changing(each)
    kept.keep(partial(_put, each, list(each)))


def _bytearray(each: bytearray, waiting: list[object], kept: _Kept) -> None:
    kept.keep(partial(each.__setitem__, slice(None), bytes(each)))


def _elements(each: Any, waiting: list[object], kept: _Kept) -> None:
    waiting += _changing(each)


def _function(each: types.FunctionType, waiting: list[object], kept: _Kept) -> None:
    if "<locals>" not in each.__qualname__:
        return  # a module's or a class's own, whatever it is wrapped in: it belongs to no machine
    waiting += _changing((*(each.__closure__ or ()), *(each.__defaults__ or ())))


def _method(each: types.MethodType, waiting: list[object], kept: _Kept) -> None:
    waiting.append(each.__self__)


def _partial(each: partial[Any], waiting: list[object], kept: _Kept) -> None:
    waiting += [each.func, each.args, each.keywords]


def _coroutine(each: greenlet.greenlet, waiting: list[object], kept: _Kept) -> None:
    if each and each is not greenlet.getcurrent():
        raise Suspended("a service is under way", advice="let everybody come to rest first")


def _iterator(each: object, waiting: list[object], kept: _Kept) -> None:
    """Whoever holds it holds a fresh copy afterwards."""


def _generator(each: object, waiting: list[object], kept: _Kept) -> None:
    raise Suspended("a generator is under way")


def _service(each: Service, waiting: list[object], kept: _Kept) -> None:
    if each.coroutine is not None and not each.coroutine.dead:
        raise Suspended(f"the service '{each.name}' is under way")
    _MEMBERS_OF_SERVICE(each, waiting, kept)


def _members_of(kind: type) -> Restorer:
    """What takes the members of an object of a class of ours."""
    names, is_frozen = _slots(kind), _is_frozen(kind)
    values_of = _values_of(names)

    def members(each: Any, waiting: list[object], kept: _Kept) -> None:
        if names:
            try:
                values = values_of(each)
            except AttributeError:
                _some_unset(each, names, waiting, kept, is_frozen=is_frozen)
            else:
                waiting += _changing(values)
                if not is_frozen:
                    kept.keep_slots(each, values_of, names, values)
        of_dict = getattr(each, "__dict__", None)
        if of_dict is None:
            return
        if is_frozen or not kept.keep_dict(of_dict):
            waiting += _changing(of_dict.values())

    return members


def _values_of(names: tuple[str, ...]) -> Callable[[Any], tuple[Any, ...]]:
    """What reads all these members at once."""
    if len(names) > 1:
        return attrgetter(*names)
    return lambda each: tuple(getattr(each, name) for name in names)


def _some_unset(
    each: Any, names: Iterable[str], waiting: list[object], kept: _Kept, *, is_frozen: bool
) -> None:
    """The same for an object that has not all of its slots set."""
    values = [(name, getattr(each, name, _NOTHING)) for name in names]
    waiting += _changing([value for _, value in values])
    if not is_frozen:
        kept.keep(partial(_put_slots, each, values))


def _cell(cell: types.CellType, waiting: list[object], kept: _Kept) -> None:
    try:
        contents = cell.cell_contents
    except ValueError:  # empty
        return
    waiting.append(contents)
    kept.keep(partial(setattr, cell, "cell_contents", contents))


def _put_dict(target: dict[Any, Any], contents: dict[Any, Any], iterators: tuple[Any, ...]) -> None:
    """Put back what moves on when it is used (the iterators), too."""
    target.clear()
    target.update(contents)
    for key in iterators:
        target[key] = copy.copy(contents[key])


def _put(target: Any, contents: list[Any]) -> None:
    target.clear()
    (target.extend if isinstance(target, deque) else target.update)(contents)


def _put_slots(target: Any, values: list[tuple[str, Any]]) -> None:
    for name, value in values:
        if value is not _NOTHING:
            setattr(target, name, value)
        elif hasattr(target, name):
            delattr(target, name)


def _loaded(each: LoadedObject, waiting: list[object], kept: _Kept) -> None:
    """The kernel itself is not unloaded."""
    if not each.placement.is_linked:
        _MEMBERS_OF_LOADED(each, waiting, kept)


def _placement(each: Placement, waiting: list[object], kept: _Kept) -> None:
    """Where a linked image lies, and its tens of megabytes there, is settled when it has booted."""
    if not each.is_linked:
        _MEMBERS_OF_PLACEMENT(each, waiting, kept)


_RESTORERS: Final[tuple[tuple[type | tuple[type, ...], Restorer], ...]] = (
    (dict, _dict),
    (list, _list),
    ((tuple, frozenset), _elements),
    ((set, deque), _unordered),
    (bytearray, _bytearray),
    (LoadedObject, _loaded),
    (Placement, _placement),
    (Service, _service),
    (types.FunctionType, _function),
    (types.CellType, _cell),
    (types.MethodType, _method),
    (partial, _partial),
    (greenlet.greenlet, _coroutine),
    (_ITERATORS, _iterator),
    (types.GeneratorType, _generator),
)
_SLOTS: dict[type, tuple[str, ...]] = {}


def _slots(kind: type) -> tuple[str, ...]:
    known = _SLOTS.get(kind)
    if known is None:
        found = [each.__dict__.get("__slots__", ()) for each in kind.__mro__]
        names = [name for slots in found for name in ((slots,) if isinstance(slots, str) else slots)]
        known = _SLOTS[kind] = tuple(each for each in names if each not in ("__dict__", "__weakref__"))
    return known


def _is_frozen(kind: type) -> bool:
    parameters = getattr(kind, "__dataclass_params__", None)
    return parameters is not None and bool(parameters.frozen)


_MEMBERS_OF_SERVICE, _MEMBERS_OF_LOADED, _MEMBERS_OF_PLACEMENT = map(
    _members_of, (Service, LoadedObject, Placement)
)
