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
from typing import TYPE_CHECKING, Any, Final
from weakref import finalize

import greenlet

from elf.errors import KlpemuError
from elf.image import Image
from elf.layout import StructLayout
from emu.events import Event
from emu.kallsyms import Ksym
from emu.memory import PAGE_SIZE
from emu.task import Service, Task
from emu.view import Layouts, Struct

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = ["RestorePoint", "Suspended"]

# What nobody changes once it is made, and memory that is copied otherwise.
_FIXED: Final = (
    *(int, str, bytes, float, bool, type(None), type, Enum, range, mmap.mmap, memoryview, finalize),
    *(types.ModuleType, types.BuiltinFunctionType, types.CodeType, BaseException),
    *(Image, StructLayout, Layouts, Event, Ksym, Struct),
)
_FOREIGN: Final = ("unicorn.", "ctypes", "_ctypes", "_struct")
_ITERATORS: Final[tuple[type, ...]] = (type(iter(range(0))), type(iter(())), type(iter([])))
_NOTHING: Final = object()


class Suspended(KlpemuError):  # noqa: N818  (said of a service)
    """A service waits at its door, and cannot be copied there."""


class RestorePoint:
    """One moment of a machine, to which it can be put back any number of times.

    `roots` are objects that belong to the machine and are not reached from it, such as a Kernel.  Raises
    `Suspended` while a service is under way.
    """

    def __init__(self, machine: "Machine", *roots: object) -> None:
        self._machine = machine
        self._objects = list(_restorers((machine, *roots)))
        arena = machine.space.arena
        writable, image = arena.in_use()
        self._writable = arena.bytes[: writable.stop]
        self._image = arena.bytes[image.start : image.stop]
        self._executable = dict(machine.space.executable())
        self._cpus = [(cpu, cpu.context()) for cpu in (*machine.cpus, machine.tracer)]

    @property
    def size(self) -> int:
        """Bytes of guest memory that were copied."""
        return len(self._writable) + len(self._image)

    def restore(self) -> None:
        """Put the machine back; nothing of it may be running."""
        machine = self._machine
        for task in _tasks(machine):
            machine.hub.drop_services(task)
        self._drop_changed_text()
        arena = machine.space.arena
        writable, image = arena.in_use()
        start = arena.size - len(self._image)
        # Frames that nobody has must be zero.
        end = max(writable.stop, len(self._writable))
        arena.bytes[:end] = self._writable.ljust(end, b"\0")
        arena.bytes[min(image.start, start) :] = bytes(max(start - image.start, 0)) + self._image
        for restore in self._objects:
            restore()
        for cpu, context in self._cpus:
            cpu.set_context(context)
        machine.space.flush_tlb()

    def _drop_changed_text(self) -> None:
        """Forget the translations of pages that hold other code now, while they are still mapped."""
        space = self._machine.space
        memory = space.arena.bytes
        start = space.arena.size - len(self._image)
        for page, frame in list(space.executable()):
            at = frame - start
            if (
                self._executable.get(page) != frame
                or memory[frame : frame + PAGE_SIZE] != self._image[at : at + PAGE_SIZE]
            ):
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
        if isinstance(each, _FIXED) or id(each) in seen or type(each).__module__.startswith(_FOREIGN):
            continue
        seen[id(each)] = each  # kept alive, so that no other object gets its number
        restore = _restorer(each, waiting)
        if restore is not None:
            yield restore


def _restorer(each: Any, waiting: list[object]) -> Callable[[], None] | None:
    """What puts one object back, None if it cannot change; what it refers to is appended to `waiting`."""
    match each:
        case dict():
            waiting += [*each.keys(), *each.values()]
            return partial(_put_dict, each, *_kept(each))
        case list():
            waiting += each
            return partial(each.__setitem__, slice(None), list(each))
        case set() | deque():
            waiting += each
            return partial(_put, each, list(each))
        case bytearray():
            return partial(each.__setitem__, slice(None), bytes(each))
        case tuple() | frozenset():
            waiting += each
            return None
        case types.FunctionType():
            waiting += [*(each.__closure__ or ()), *(each.__defaults__ or ())]
            return None
        case types.CellType():
            return _cell(each, waiting)
        case types.MethodType():
            waiting.append(each.__self__)
            return None
        case partial():
            waiting += [each.func, each.args, each.keywords]
            return None
        case greenlet.greenlet():
            if each and each is not greenlet.getcurrent():
                raise Suspended("a service is under way", advice="let everybody come to rest first")
            return None
        case _ if isinstance(each, _ITERATORS):
            return None  # whoever holds it holds a fresh copy afterwards
        case types.GeneratorType():
            raise Suspended("a generator is under way")
    return _members(each, waiting)


def _members(each: Any, waiting: list[object]) -> Callable[[], None] | None:
    """What puts the members of an object of a class of ours back."""
    slots = _slots(type(each))
    values = [(name, getattr(each, name, _NOTHING)) for name in slots]
    waiting += [value for _, value in values if value is not _NOTHING]
    members = getattr(each, "__dict__", None)
    if members is not None:
        waiting += members.values()
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
