"""Which sequences of operations there are: what a kernel, its modules, its patches and its tasks offer.

A world is a scenario whose steps are no sequence but examples: each may come anywhere.  To them come the
operations that its patches and tasks imply.  A sequence is random, but rather such that something happens: a
patch is disabled more often if it was enabled before.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from os import fspath
from pathlib import Path
from typing import Final

from klpemu.fixtures import locate
from klpemu.fuzz.interleaving import Turn, interleaved
from klpemu.fuzz.module_file import ModuleFile
from klpemu.scenario import Action, Scenario, Step
from klpemu.task_file import system_tasks

__all__ = ["FTRACE_ENABLED", "LENGTH", "Grammar"]

LENGTH: Final = 20  # steps of a fresh sequence, at most
FTRACE_ENABLED: Final = "/proc/sys/kernel/ftrace_enabled"
TRACERS: Final = ("first", "second", "third")
MSECS: Final = (1, 4, 20, 100, 500, 2000, 20_000)  # the last is longer than the 15 s until signals go out
SETTLING: Final = (100, 500, 2000)  # in which a transition ends that nobody holds up for long
# Allocations that may fail, by a part of their tags.
ALLOCATIONS: Final = ("klp_ops", "ftrace_hash", "ftrace_trampoline", "nop", "module", "klp_object")
_WEIGHTS: Final = {
    Action.ENABLE: 5,
    Action.DISABLE: 4,
    Action.REVERSE: 2,
    Action.FORCE: 1,
    Action.SPAWN: 4,
    Action.RUN: 4,
    Action.LOAD: 2,
    Action.UNLOAD: 2,
    Action.MODPROBE: 1,
    Action.RMMOD: 1,
    Action.CALL: 2,
    Action.READ: 2,
    Action.FTRACE: 3,
    Action.UNFTRACE: 3,
    Action.WRITE: 1,
}
# Where the modules that come and go are livepatches, that is how patches are enabled and removed.
_OF_LIVEPATCHES: Final = {Action.MODPROBE: 6, Action.RMMOD: 4}
_TRANSITIONS: Final = (Action.ENABLE, Action.DISABLE, Action.REVERSE, Action.FORCE)
_OF_MODULES: Final = (Action.LOAD, Action.UNLOAD, Action.MODPROBE, Action.RMMOD)
# What others can be in the middle of something at.
_CHANGES: Final = (*_TRANSITIONS, Action.LOAD, Action.UNLOAD, Action.FTRACE, Action.UNFTRACE, Action.CALL)
_LOADS: Final = (Action.LOAD, Action.MODPROBE)
_REMOVES: Final = (Action.UNLOAD, Action.RMMOD)
# The opposite of an operation, by what it does to its target.
_UNDOES: Final = {
    Action.DISABLE: Action.ENABLE,
    Action.REVERSE: Action.ENABLE,
    Action.FORCE: Action.ENABLE,
    Action.UNFTRACE: Action.FTRACE,
    Action.RMMOD: Action.MODPROBE,
    Action.UNLOAD: Action.LOAD,
}


@dataclass(frozen=True)
class Grammar:
    """The operations of one world."""

    world: Scenario

    @cached_property
    def operations(self) -> dict[Action, list[Step]]:
        """Every operation there is, without a schedule, by what it does."""
        steps = [*self._of_patches(), *self._of_tasks(), *self._of_tracers(), *self.world.steps]
        steps += [Step(Action.RUN, f"{msecs} ms", msecs=msecs) for msecs in MSECS]
        steps += [Step(Action.WRITE, FTRACE_ENABLED, value=value) for value in "011"]
        found: dict[Action, list[Step]] = {}
        for step in steps:
            found.setdefault(step.action, []).append(_unexpecting(step))
        return found

    def fits(self, steps: Sequence[Step]) -> bool:
        """Whether all patches and tasks that are named are of this world."""
        return all(
            each.target in self.world.patches
            if each.action is Action.ENABLE
            else each.action is not Action.SPAWN or each.target in self.world.tasks
            for each in steps
        )

    def sequence(self, random_: random.Random, length: int = LENGTH) -> list[Step]:
        """A fresh sequence."""
        steps: list[Step] = []
        operations = self._some(random_, ())
        for _ in range(random_.randint(2, length)):
            if random_.random() < 0.3:
                operations = self._some(random_, steps)
            steps.append(self._step(random_, steps, operations))
        return steps

    def step(self, random_: random.Random, before: Sequence[Step]) -> Step:
        """One step that may come behind those."""
        return self._step(random_, before, self._some(random_, before))

    def behind(self, random_: random.Random, before: Sequence[Step], count: int) -> list[Step]:
        """So many steps that may come behind those, or one more if there is room."""
        steps = list(before)
        operations = self._some(random_, before)
        for _ in range(count):
            steps.append(self._step(random_, steps, operations))
        if steps[-1].action is Action.SPAWN and len(steps) < LENGTH:  # which alone does nothing yet
            steps.append(self._step(random_, steps, operations))
        return steps[len(before) :]

    def raced(self, random_: random.Random, before: Sequence[Step]) -> Step:
        """A step that may come behind those, and in the middle of which others can be."""
        operations = self._some(random_, before)
        changes: dict[Action, list[Step]] = {
            kind: steps for kind, steps in operations.items() if kind in _CHANGES
        }
        return self._step(random_, before, changes or operations)

    def scheduled(self, random_: random.Random, before: Sequence[Step], step: Step) -> Step:
        """The same step, with a schedule."""
        return replace(step, schedule=self._schedule(random_, before, step))

    def _some(self, random_: random.Random, before: Sequence[Step]) -> dict[Action, list[Step]]:
        """Some of the operations, and those on what was used before.

        A sequence that does little of everything seldom does two things that have to do with each other
        (Groce, Zhang, Eide, Chen and Regehr, "Swarm Testing", 2012).
        """
        used = {name for each in before for name in (each.target, _module(each)) if name}
        used.update(
            _sample(random_, [*self.world.patches], 1, 3), _sample(random_, [*self.world.tasks], 1, 2)
        )
        used.update(_sample(random_, self._modules, 0, 2))
        used.update(*(self._patched[each] for each in self._patched if each in used))
        share = {Action.WRITE: 0.1, Action.FTRACE: random_.choice((0.0, 0.5, 1.0))}
        replaced = {each for name in used for each in self._replaced.get(name, ())}
        found: dict[Action, list[Step]] = {}
        for kind, steps in self.operations.items():
            named = kind in _TRANSITIONS or kind in _OF_MODULES or kind is Action.SPAWN
            if kind is Action.FTRACE:
                steps = [each for each in steps if replaced.issuperset(each.functions)] or steps
            kept = [
                each
                for each in steps
                if {each.target, _module(each)} & used
                or (not named and random_.random() < share.get(kind, 0.3))
            ]
            if kept:
                found[kind] = kept
        return found | {Action.RUN: self.operations[Action.RUN]}

    def _step(
        self, random_: random.Random, before: Sequence[Step], operations: dict[Action, list[Step]]
    ) -> Step:
        if before and (at_once := self._at_once(random_, before)) is not None:
            return at_once
        # Who has been started lately is in the middle of something: that is when to change something.
        starts = any(each.action is Action.SPAWN for each in before[-3:])
        kinds = [each for each in _WEIGHTS if each in operations]
        if starts and random_.random() < 0.7:
            kinds = [each for each in kinds if each in _CHANGES] or kinds
        kind = random_.choices(kinds, [self._weights[each] for each in kinds])[0]
        step = random_.choice(self._choices(random_, before, operations, kind))
        if step.action not in (Action.SPAWN, Action.RUN) and random_.random() < 0.03:
            return replace(step, fail_alloc=random_.choice(ALLOCATIONS))
        if random_.random() < (0.8 if starts else 0.2):
            return self.scheduled(random_, before, step)
        return step

    def _choices(
        self,
        random_: random.Random,
        before: Sequence[Step],
        operations: dict[Action, list[Step]],
        kind: Action,
    ) -> list[Step]:
        """Operations of a kind: mostly, what was done is undone, and what has gone comes back."""
        choices = operations[kind]
        if kind in _UNDOES and random_.random() < 0.9:
            done = {
                _module(each) or each.target
                for each in before
                if each.action is _UNDOES[kind] or self._is_livepatch(each)
            }
            undone = [each for each in choices if each.target in done]
            if not undone and _UNDOES[kind] in self.operations:  # it has to be done first
                kind = _UNDOES[kind]
                undone = operations.get(kind) or self.operations[kind]
            choices = undone or choices
        if kind in _LOADS:
            gone = {each.target for each in before if each.action in _REMOVES}
            choices = [each for each in choices if _module(each) in gone] or choices
        return choices

    def _at_once(self, random_: random.Random, before: Sequence[Step]) -> Step | None:
        """What often comes right behind a step: time for its transition, what it has removed, or a race with
        the task that it has started, who does the same.
        """
        last = before[-1]
        if self._begins_transition(last) and random_.random() < 0.5:
            return random_.choice([each for each in self.operations[Action.RUN] if each.msecs in SETTLING])
        if last.action in _REMOVES and random_.random() < 0.3:
            loads = [each for kind in _LOADS for each in self.operations.get(kind, ())]
            again = [each for each in loads if _module(each) == last.target]
            return random_.choice(again) if again else None
        if last.target in self.world.tasks and last.action is Action.SPAWN and random_.random() < 0.3:
            program = self.world.tasks[last.target].program
            same = [each for each in self.operations.get(Action.CALL, ()) if each.target in program]
            return self.scheduled(random_, before, random_.choice(same)) if same else None
        return None

    def varied(self, random_: random.Random, steps: Sequence[Step]) -> list[Step]:
        """A sequence that differs from `steps` by one to four changes; at most as long as a fresh one."""
        varied = list(steps)
        for _ in range(random_.choice((1, 1, 2, 4))):
            at = random_.randint(0, len(varied))
            match random_.randrange(5):
                case 0 if at < len(varied):
                    del varied[at]
                case 1 if at < len(varied):
                    varied[at] = self.step(random_, varied[:at])
                case 2 if at < len(varied):
                    varied[at] = self.scheduled(random_, varied[:at], varied[at])
                case 3 if at < len(varied):
                    varied.insert(random_.randrange(len(varied)), varied.pop(at))
                case _:
                    varied.insert(at, self.step(random_, varied[:at]))
        while len(varied) < LENGTH and random_.random() < 0.5:
            varied.append(self.step(random_, varied))
        return varied[:LENGTH]

    def _schedule(self, random_: random.Random, before: Sequence[Step], step: Step) -> tuple[Turn, ...]:
        system = system_tasks(self.world.cpus)[-self.world.cpus - 1 :]
        spawned = list(dict.fromkeys(each.target for each in before if each.action is Action.SPAWN))
        return interleaved(random_, step.action, spawned, system)

    @cached_property
    def _modules(self) -> list[str]:
        """The names of the modules that come and go."""
        return list(dict.fromkeys(_module(each) for each in self.world.steps if each.action in _OF_MODULES))

    @cached_property
    def _patched(self) -> dict[str, set[str]]:
        """By patch, the objects that it is known to patch."""
        found = {name: set(each.objects) for name, each in self.world.patches.items()}
        for name, each in self.world.patches.items():
            if each.code is not None and not each.objects:
                found[name].update(ModuleFile.open(locate(fspath(each.code), self.world.base)).objnames)
        return found

    @cached_property
    def _replaced(self) -> dict[str, list[str]]:
        """By patch, the functions of the kernel that it replaces, as ftrace is told them."""
        return {
            name: [
                func.old if not func.sympos else f"{func.old},{func.sympos}"
                for func in each.objects.get("vmlinux", ())
            ]
            for name, each in self.world.patches.items()
        }

    @cached_property
    def _weights(self) -> dict[Action, int]:
        livepatches = any(self._is_livepatch(each) for each in self.world.steps)
        return _WEIGHTS | (_OF_LIVEPATCHES if livepatches else {})

    def _is_livepatch(self, step: Step) -> bool:
        """Whether the step loads a module that is one of the patches."""
        return step.action is Action.MODPROBE and _module(step) in self.world.patches

    def _begins_transition(self, step: Step) -> bool:
        return step.action in _TRANSITIONS or self._is_livepatch(step)

    def _of_patches(self) -> list[Step]:
        actions = (Action.ENABLE, Action.DISABLE, Action.REVERSE, Action.FORCE)
        return [Step(action, name) for name in self.world.patches for action in actions]

    def _of_tasks(self) -> list[Step]:
        return [Step(Action.SPAWN, name) for name in self.world.tasks]

    def _of_tracers(self) -> list[Step]:
        """Tracers of the functions of the kernel that patches replace."""
        functions = list(dict.fromkeys(each for found in self._replaced.values() for each in found))
        if not functions:
            return []
        sets = [(each,) for each in functions[:3]] + [tuple(functions[:2])]
        registered = [
            Step(Action.FTRACE, name, functions=each) for name in TRACERS for each in dict.fromkeys(sets)
        ]
        return registered + [Step(Action.UNFTRACE, name) for name in TRACERS]


def _unexpecting(step: Step) -> Step:
    """The operation without what a scenario expects of it: it comes at any time."""
    return Step(
        step.action,
        step.target,
        step.call,
        step.msecs,
        value=step.value,
        parameters=step.parameters,
        functions=step.functions,
        fail_alloc=step.fail_alloc,
    )


def _module(step: Step) -> str:
    """The name of the module that a step loads or unloads; "" for other steps."""
    if step.action not in _OF_MODULES:
        return ""
    return Path(step.target).stem.rpartition(":")[2].replace("-", "_")


def _sample(random_: random.Random, names: Sequence[str], least: int, most: int) -> list[str]:
    return random_.sample(names, min(len(names), random_.randint(least, most)))
