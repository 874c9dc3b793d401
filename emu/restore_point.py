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
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from functools import partial
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Final
from weakref import finalize

import greenlet

from elf.errors import KlpemuError
from elf.image import Image
from elf.layout import StructLayout
from elf.unwind_row import UnwindRow
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
    *(Image, StructLayout, Layouts, Event, Ksym, SymbolTable, Struct, UnwindRow, Vmlinux, Remembered),
)
_FOREIGN: Final = ("unicorn.", "ctypes", "_ctypes", "_struct")
_ITERATORS: Final[tuple[type, ...]] = (type(iter(range(0))), type(iter(())), type(iter([])))
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
        self._objects = list(_restorers((machine, *roots)))
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
        for restore in self._objects:
            restore()
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


def _restorers(roots: Iterable[object]) -> Iterator[Callable[[], None]]:
    """For each object that can change, what puts its contents back."""
    seen: dict[int, object] = {}
    waiting = list(roots)
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        kind = type(each)
        if kind in _fixed:
            continue
        restorer = _known.get(kind) or _restorer_of(kind)
        if restorer is None:
            _fixed.add(kind)
            continue
        seen[id(each)] = each  # kept alive, so that no other object gets its number
        restore = restorer(each, waiting)
        if restore is not None:
            yield restore


# What puts one object back, None if it cannot change; what it refers to is appended to the list.
Restorer = Callable[[Any, list[object]], Callable[[], None] | None]


def _restorer_of(kind: type) -> Restorer | None:
    """How objects of a type are put back; None if there is nothing about them that changes."""
    if issubclass(kind, _FIXED) or kind.__module__.startswith(_FOREIGN):
        return None
    found = next((restorer for types_, restorer in _RESTORERS if issubclass(kind, types_)), _members)
    _known[kind] = found
    return found


def _changing(values: Iterable[object]) -> list[object]:
    """Those that have to be looked at; most are numbers and names."""
    return [each for each in values if type(each) not in _fixed]


def _dict(each: dict[Any, Any], waiting: list[object]) -> Callable[[], None]:
    waiting += _changing(each)
    waiting += _changing(each.values())
    return partial(_put_dict, each, *_kept(each))


def _list(each: list[Any], waiting: list[object]) -> Callable[[], None]:
    waiting += _changing(each)
    return partial(each.__setitem__, slice(None), list(each))


def _unordered(each: Any, waiting: list[object]) -> Callable[[], None]:
    waiting += _changing(each)
    return partial(_put, each, list(each))


def _bytearray(each: bytearray, waiting: list[object]) -> Callable[[], None]:
    return partial(each.__setitem__, slice(None), bytes(each))


def _elements(each: Any, waiting: list[object]) -> None:
    waiting += _changing(each)


def _function(each: types.FunctionType, waiting: list[object]) -> None:
    if "<locals>" not in each.__qualname__:
        return  # a module's or a class's own, whatever it is wrapped in: it belongs to no machine
    waiting += _changing((*(each.__closure__ or ()), *(each.__defaults__ or ())))


def _method(each: types.MethodType, waiting: list[object]) -> None:
    waiting.append(each.__self__)


def _partial(each: partial[Any], waiting: list[object]) -> None:
    waiting += [each.func, each.args, each.keywords]


def _coroutine(each: greenlet.greenlet, waiting: list[object]) -> None:
    if each and each is not greenlet.getcurrent():
        raise Suspended("a service is under way", advice="let everybody come to rest first")


def _iterator(each: object, waiting: list[object]) -> None:
    """Whoever holds it holds a fresh copy afterwards."""


def _generator(each: object, waiting: list[object]) -> None:
    raise Suspended("a generator is under way")


def _members(each: Any, waiting: list[object]) -> Callable[[], None] | None:
    """What puts the members of an object of a class of ours back."""
    slots = _slots(type(each))
    values = [(name, getattr(each, name, _NOTHING)) for name in slots]
    waiting += _changing(value for _, value in values)
    members = getattr(each, "__dict__", None)
    if members is not None:
        waiting += _changing(members.values())
    if isinstance(each, Service) and each.coroutine is not None and not each.coroutine.dead:
        raise Suspended(f"the service '{each.name}' is under way")
    if _is_frozen(type(each)):
        return None
    if not slots:
        return None if members is None else partial(_put_dict, members, *_kept(members))
    return partial(_put_slots, each, values, members, *_kept(members or {}))


def _cell(cell: types.CellType, waiting: list[object]) -> Callable[[], None] | None:
    try:
        contents = cell.cell_contents
    except ValueError:  # empty
        return None
    waiting.append(contents)
    return partial(setattr, cell, "cell_contents", contents)


def _kept(contents: dict[Any, Any]) -> tuple[dict[Any, Any], tuple[Any, ...]]:
    """A copy to be put back, and the keys of what moves on when it is used."""
    iterators = tuple(key for key, value in contents.items() if isinstance(value, _ITERATORS))
    return contents | {key: copy.copy(contents[key]) for key in iterators}, iterators


def _put_dict(target: dict[Any, Any], contents: dict[Any, Any], iterators: tuple[Any, ...]) -> None:
    target.clear()
    target.update(contents)
    for key in iterators:
        target[key] = copy.copy(contents[key])


def _put(target: Any, contents: list[Any]) -> None:
    target.clear()
    (target.extend if isinstance(target, deque) else target.update)(contents)


def _put_slots(
    target: Any,
    values: list[tuple[str, Any]],
    members: dict[str, Any] | None,
    contents: dict[str, Any],
    iterators: tuple[Any, ...],
) -> None:
    for name, value in values:
        if value is not _NOTHING:
            setattr(target, name, value)
        elif hasattr(target, name):
            delattr(target, name)
    if members is not None:
        _put_dict(members, contents, iterators)


def _loaded(each: LoadedObject, waiting: list[object]) -> Callable[[], None] | None:
    """The kernel itself is not unloaded."""
    return None if each.placement.is_linked else _members(each, waiting)


def _placement(each: Placement, waiting: list[object]) -> Callable[[], None] | None:
    """Where a linked image lies, and its tens of megabytes there, is settled when it has booted."""
    return None if each.is_linked else _members(each, waiting)


_RESTORERS: Final[tuple[tuple[type | tuple[type, ...], Restorer], ...]] = (
    (dict, _dict),
    (list, _list),
    ((tuple, frozenset), _elements),
    ((set, deque), _unordered),
    (bytearray, _bytearray),
    (LoadedObject, _loaded),
    (Placement, _placement),
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
