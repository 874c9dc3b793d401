"""What the invariants judge: memory to be read, the files' text, and the patches as declared."""

import bisect
from collections.abc import Callable, Hashable, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from typing import Any, Final

from emu.kallsyms import Kallsyms
from emu.memory import Memory, read_u64
from emu.module import LoadedObject, Text
from emu.remembered import Remembered
from emu.slab import Slab
from emu.stream import Stream
from emu.view import Layouts
from patches.invariants.registered import FtraceState, read_ftrace

__all__ = ["ExpectedFunc", "RememberingSubject", "Subject"]


@dataclass(frozen=True, slots=True)
class ExpectedFunc:
    """A patched function: where it is, and where each patch on its func_stack sends a call, newest first.

    An entry of `stack` is the address of a replacement, or None for a nop func.  `moving`: the newest one is
    in transition, so that a task which has not switched gets what is below it.
    """

    address: int
    name: str
    stack: tuple[int | None, ...]
    moving: bool = False


@dataclass(frozen=True)
class Subject:
    """One state of one machine.

    `texts` are the executable sections as their files and relocations give them, `sites` the fentry sites the
    files name; `functions` the patched functions; `patches` the names of the enabled patches, oldest first.
    `execute` runs a stream on a machine in this state, for a task with the given patch_state (None: as it
    is); without it (a dump, say) streams are not checked.
    `remaining` are the allocations, address and tag, that exist beyond those of the kernel, its modules and
    its enabled patches.
    `shadow_users` are the livepatch modules that have allocated or freed shadow variables, by these' id.
    `livepatches` are the modules of the enabled patches.
    `directories` are those below /sys/kernel/livepatch, with the address of the kobject that each shows, 0
    for none; None if nothing is known of them (a dump, say).  `log` are the lines of the kernel's log.
    `return_thunk_at` gives the address of the thunk through which the return at an address has to go.
    """

    memory: Memory
    layouts: Layouts
    kallsyms: Kallsyms
    symbols: Mapping[str, int]
    texts: Sequence[Text]
    sites: frozenset[int]
    functions: Sequence[ExpectedFunc]
    patches: Sequence[str]
    execute: Callable[..., Stream] | None = None
    slab: Slab | None = None
    remaining: Sequence[tuple[int, str]] = ()
    shadow_users: Mapping[int, Set[str]] = field(default_factory=dict)
    livepatches: Sequence[LoadedObject] = ()
    directories: Mapping[str, int] | None = None
    log: Sequence[str] = ()
    return_thunk_at: Callable[[int], int | None] = lambda address: None

    @cached_property
    def ftrace(self) -> FtraceState:
        """The records and the registered ops."""
        return _ftrace_of(self)

    def sites_in(self, start: int, end: int) -> list[int]:
        """The files' sites in [start, end)."""
        ordered = _in_order(self.sites)
        return ordered[bisect.bisect_left(ordered, start) : bisect.bisect_left(ordered, end)]

    def run(self, function: int, target: int, state: int | None) -> Stream | None:
        """The stream from a function to a target, executed; None if there is no machine."""
        return None if self.execute is None else self.execute(function, target, state)

    def once(self, function: Callable[..., Any], *arguments: Hashable) -> Any:
        """`function(subject, *arguments)`: a part of a check that may be remembered apart from the rest."""
        return function(self, *arguments)

    def place(self, address: int) -> str:
        """What lies at an address: the symbol, or the heap object, with the offset in it."""
        if self.kallsyms.at(address) is None:
            index = bisect.bisect_right(self._objects, (address, 1 << 64, "")) - 1
            if index >= 0:
                start, size, tag = self._objects[index]
                if address < start + size:
                    return f"{tag}+{address - start:#x}/{size:#x}"
        return self.kallsyms.describe(address)

    @cached_property
    def walked(self) -> dict[tuple[int, int], tuple[list[int], bool]]:
        """Lists that were walked already, by head and direction (patches/invariants/walk.py)."""
        return {}

    @cached_property
    def _objects(self) -> list[tuple[int, int, str]]:
        live = self.slab.live if self.slab is not None else {}
        return sorted((start, size, tag) for start, (size, tag) in live.items())

    def view(self, name: str, address: int) -> Any:
        """A typed view that can only read."""
        return self.layouts.view(name, self.memory, address)

    def pointer(self, symbol: str) -> int:
        """The value of a global pointer."""
        return read_u64(self.memory, self.symbols[symbol])


_FIELDS: Final = tuple(each.name for each in fields(Subject))


class RememberingSubject(Subject):
    """A subject that says what is looked at, for `Remembered.call`: memory through `remembered`, and facts.

    A fact is whatever else of the subject can change.
    """

    remembered: Remembered

    @classmethod
    def of(cls, subject: Subject, remembered: Remembered) -> "RememberingSubject":
        """The same state, looked at through what is remembered."""
        made = cls.__new__(cls)
        # Nothing that was computed from the state is taken over: it has to be read again, and that noted.
        made.__dict__.update({name: subject.__dict__[name] for name in _FIELDS})
        made.__dict__.update(memory=remembered, remembered=remembered, _facts={})
        return made

    def run(self, function: int, target: int, state: int | None) -> Stream | None:
        stream = super().run(function, target, state)
        if stream is not None:
            self.remembered.note_stream(stream)
        return stream

    def afresh(self) -> "RememberingSubject":
        """The same once more, for a function whose reading is noted apart from that of others."""
        made = type(self).of(self, self.remembered)
        made.__dict__["_facts"] = self.__dict__["_facts"]
        return made

    def unwatched(self) -> Subject:
        """The same state for what is not remembered: nobody notes what that looks at."""
        made = Subject.__new__(Subject)
        made.__dict__.update({name: self.__dict__[name] for name in _FIELDS})
        made.__dict__.update(memory=self.remembered.space, ftrace=self.fact("ftrace"))
        return made

    def fact(self, name: str) -> Hashable:
        """See `emu.remembered.Facts`."""
        facts: dict[str, Hashable] = self.__dict__["_facts"]
        if name not in facts:
            facts[name] = _FACTS[name](self.__dict__.get(name), self)
        return facts[name]

    def sites_in(self, start: int, end: int) -> list[int]:
        self.remembered.note("sites")
        return super().sites_in(start, end)

    def place(self, address: int) -> str:
        self.remembered.note("slab")
        return super().place(address)

    def once(self, function: Callable[..., Any], *arguments: Hashable) -> Any:
        return self.remembered.call(function, self.afresh(), *arguments)

    def state_of_ftrace(self) -> FtraceState:
        """What is itself remembered: an equal state is the same object."""
        state: FtraceState = self.remembered.apart(_ftrace_of, self.afresh())
        return state


@lru_cache(maxsize=16)
def _in_order(sites: frozenset[int]) -> list[int]:
    """A kernel has 40,000 sites, and they are the same at each step."""
    return sorted(sites)


def _ftrace_of(subject: Subject) -> FtraceState:
    end = subject.symbols["ftrace_list_end"]
    return read_ftrace(
        subject.memory, subject.layouts, subject.kallsyms, subject.pointer, end, len(subject.sites)
    )


# By name of the attribute, what is compared: it gets the attribute, and the subject.
_FACTS: Final[dict[str, Callable[[Any, RememberingSubject], Hashable]]] = {
    "kallsyms": lambda kallsyms, subject: kallsyms.contents(),
    "texts": lambda texts, subject: tuple(texts),
    "sites": lambda sites, subject: sites,
    "functions": lambda functions, subject: tuple(functions),
    "patches": lambda patches, subject: tuple(patches),
    "slab": lambda slab, subject: None if slab is None else slab.contents(),
    "remaining": lambda remaining, subject: tuple(remaining),
    "shadow_users": lambda users, subject: tuple((id_, frozenset(names)) for id_, names in users.items()),
    "livepatches": lambda modules, subject: tuple(map(_identity, modules)),
    "directories": lambda found, subject: None if found is None else tuple(found.items()),
    "log": lambda lines, subject: tuple(lines),
    "ftrace": lambda _, subject: subject.state_of_ftrace(),
}


def _identity(loaded: LoadedObject) -> Hashable:
    """A module: its file, where its parts are, and what was written into it."""
    placement = loaded.placement
    where, written = tuple(placement.addresses.items()), tuple(placement.klp.written.items())
    return loaded.name, placement.image, where, written


def _noted(name: str) -> property:
    def get(subject: RememberingSubject) -> Any:
        subject.remembered.note(name)
        return subject.fact(name) if name == "ftrace" else subject.__dict__[name]

    return property(get)


for _name in _FACTS:
    setattr(RememberingSubject, _name, _noted(_name))
