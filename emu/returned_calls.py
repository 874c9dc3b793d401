"""What a service still knows of a call that has returned: its result.

Where a service stands is told by what it has read since it began (`Footprint.seen`).  Most of that it
forgets when the function that has read it returns.  So a function that comes back with nothing but a value,
and has changed no object that only this service has, counts as one value that was read: two services that
have come to the same result in different ways stand at the same place.

Arguments that only the service has are described before and after; what cannot be described, a result or an
argument, keeps all that was read.  An exception does, too.  Objects that services share are part of the state
(emu/same_state.py).
"""

import dis
import inspect
import sys
import types
from collections.abc import Callable, Hashable
from functools import partial, wraps
from typing import Any, Final

from emu.footprint import Recorder

__all__ = ["ReturnedCalls"]

# Where kernel services are: what is called below them is too small, or is asked for too often.
_MODULES: Final = (
    *("dyn_ftrace", "fork", "ftrace", "ftrace_code", "ftrace_hash", "ftrace_ops", "ftrace_rec", "kernfs"),
    *("kfree_rcu", "kobject", "list", "module", "module_area", "module_state", "module_sysfs", "module_use"),
    *(
        "mutex",
        "rcu",
        "rwlock",
        "sched",
        "slab",
        "sleep",
        "spinlock",
        "switch_to",
        "text_poke",
        "thread_info",
    ),
    *("trampoline", "wait", "work_struct", "workqueue"),
)
_ROOMS: Final = ("emu", "patches", "klpemu")
_DEPTH: Final = 4  # of what is described, and how much of it
_MANY: Final = 64


class _UnknownError(Exception):
    """Nothing is known of a value but its identity."""


class ReturnedCalls:
    """Forgets what calls have read, on behalf of a recorder; `known` gives a number for what was there at the
    beginning, None for anything else, and `form` and `members` how objects are described (emu/same_state.py).
    """

    def __init__(
        self,
        recorder: Recorder,
        shown: Callable[[Any], int],
        known: Callable[[Any], int | None],
        form: Callable[[type], str],
        members: Callable[[type], tuple[bool, tuple[str, ...], bool]],
    ) -> None:
        self._recorder = recorder
        self._shown = shown
        self._known = known
        self._form = form
        self._members = members

    def install(self) -> None:
        """Put it around the functions of kernel services, in this process; there is no way back."""
        replaced: dict[int, tuple[Any, Any]] = {}
        for name, module in [*sys.modules.items()]:
            room, _, rest = name.partition(".")
            if (room == "emu" and rest in _MODULES) or (room == "patches" and "." not in rest):
                self._wrap(module, replaced)
        for name, module in [*sys.modules.items()]:
            if name.partition(".")[0] in _ROOMS:
                for key, value in [*vars(module).items()]:
                    if id(value) in replaced:
                        setattr(module, key, replaced[id(value)][1])

    def _wrap(self, module: types.ModuleType, replaced: dict[int, tuple[Any, Any]]) -> None:
        for value in [*vars(module).values()]:
            if getattr(value, "__module__", None) != module.__name__:
                continue
            if isinstance(value, types.FunctionType) and _is_plain(value):
                replaced[id(value)] = value, self._around(value)
            elif isinstance(value, type):
                for key, each in [*vars(value).items()]:
                    if isinstance(each, types.FunctionType) and not key.startswith("__") and _is_plain(each):
                        setattr(value, key, self._around(each))

    def _around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        recorder, described = self._recorder, self._described

        @wraps(function)
        def around(*arguments: Any, **named: Any) -> Any:
            if not recorder.sees:
                return function(*arguments, **named)
            given = (arguments, *named.values())
            try:
                before = described(given)
            except _UnknownError:
                return function(*arguments, **named)
            assert recorder.now is not None
            seen = recorder.now.seen
            result = function(*arguments, **named)
            if recorder.sees:
                try:
                    found = described(result)
                    if described(given) == before:
                        recorder.now.seen = hash((seen, found))
                except _UnknownError:
                    pass
            return result

        return around

    def _described(self, value: Any, depth: int = _DEPTH) -> Hashable:
        """All there is to know of a value, which nobody changes behind the service's back."""
        kind = type(value)
        match self._form(kind):
            case "scalar" | "struct":
                return self._shown(value)
            case "left out":
                return kind.__name__
            case form if (number := self._known(value)) is not None:
                return ("there", number)
            case form if hasattr(kind, "is_tracked_") or not depth:
                raise _UnknownError
        inner = partial(self._described, depth=depth - 1)
        match form:
            case "tuple" | "list" if len(value) <= _MANY:
                return (form, *map(inner, value))
            case "dict" if len(value) <= _MANY:
                return (form, *((inner(key), inner(each)) for key, each in value.items()))
            case "set" | "frozenset" if len(value) <= _MANY:
                return (form, frozenset(map(inner, value)))
            case "method":
                return (form, value.__func__.__qualname__, inner(value.__self__))
            case "partial":
                return (
                    form,
                    inner(value.func),
                    *map(inner, value.args),
                    *map(inner, value.keywords.values()),
                )
            case "function" if _is_plain(value):
                cells = [each.cell_contents for each in value.__closure__ or ()]
                cells += value.__defaults__ or ()
                return (form, value.__module__, value.__qualname__, *map(inner, cells))
            case "object" if kind.__name__ not in ("Service", "GuestCall", "Program", "Task"):
                return self._object(value, inner)
        raise _UnknownError

    def _object(self, value: Any, inner: Callable[[Any], Hashable]) -> Hashable:
        kind = type(value)
        members, slots, _ = self._members(kind)
        found: list[Hashable] = [kind.__name__]
        if members:
            found += [(name, inner(each)) for name, each in vars(value).items()]
        found += [inner(getattr(value, name, None)) for name in slots]
        return tuple(found)


def _is_plain(function: types.FunctionType) -> bool:
    """It keeps nothing of its own between two calls: it is no generator, and stores to no outer variable."""
    code = function.__code__
    if code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
        return False
    return not code.co_freevars or not _stores_outside(code)


def _stores_outside(code: types.CodeType) -> bool:
    outer = set(code.co_freevars)
    return any(
        each.opname in ("STORE_DEREF", "DELETE_DEREF") and each.argval in outer
        for each in dis.get_instructions(code)
    )
