"""Which answer an operation has to get: the rules of 6.1 about what is refused, and with which errno.

An oracle beside the core: it looks at how things stand before an operation (guest memory through typed views,
what is loaded, what the patch declares) and says what the operation has to come to, success or one of a few
errnos.  It shares no code with what it judges.  Where the answer hangs on what it cannot know (a module's own
init function, a transition that ends while the operation is under way) any answer is right.

Source of each rule: the kernel function that its docstring names; docs/errors.md has the errnos of
klp_enable_patch().
"""

import errno
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any, Final

from elf.errors import KlpemuError
from emu.errno import KernelErrno, errno_name
from emu.events import EventKind
from emu.ftrace_rec import FtraceBug
from emu.memory import read_string
from emu.module_state import ModuleState
from emu.view import list_for_each_entry
from klpemu.fixtures import locate
from klpemu.fuzz.grammar import FTRACE_ENABLED
from klpemu.fuzz.module_file import ModuleFile, is_chosen
from klpemu.modprobe import depends_of
from klpemu.scenario import Action, Step
from klpemu.step_runner import StepRunner
from patches.livepatch import VMLINUX, Func, Patch

__all__ = ["ANSWER", "Answers", "Before", "Wrong"]

ANSWER: Final = "the_answer_is_right"
# The rule of v6.3 instead of 6.1's: 0c05e7bd2d01 ("livepatch,x86: Clear relocation targets on a module
# removal").  The museum's bug is 6.1 as it is, so whoever asks for it is judged by what repaired it.
_CLEARED: Final = {"relocation_targets_cleared", "museum:relocations-left"}

Errnos = frozenset[str]
SUCCESS: Final[Errnos] = frozenset({""})
BUSY, INVALID, EXISTS, NO_ENTRY, NO_EXEC, NO_MEMORY, WOULD_BLOCK = (
    frozenset({errno_name(each)})
    for each in (
        *(errno.EBUSY, errno.EINVAL, errno.EEXIST, errno.ENOENT, errno.ENOEXEC, errno.ENOMEM),
        errno.EWOULDBLOCK,
    )
)


@dataclass(frozen=True, slots=True)
class Listed:
    """A patch on klp_patches, which is called as its module; its funcs by object are (name, sympos)."""

    name: str
    enabled: bool
    has_states: bool
    funcs: Mapping[str, Sequence[tuple[str, int]]]


@dataclass(frozen=True, slots=True)
class Before:
    """How things stood before an operation; `known` is False after an ftrace bug, when nothing is sure.

    `references` is what others hold of the module that the step is about, `left` are the patches of which a
    klp relocation for that module is written already.
    """

    known: bool = False
    logged: int = 0
    events: int = 0
    modules: frozenset[str] = frozenset()
    patches: tuple[Listed, ...] = ()
    transition: str = ""
    on_stacks: frozenset[int] = frozenset()
    ftrace_enabled: bool = True
    tracers: frozenset[str] = frozenset()
    being_freed: bool = False
    references: int = 0
    is_live: bool = True
    stays: bool = False
    left: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Wrong:
    """A wrong answer, in words, and a right one: an errno's name, "" for success."""

    what: str
    right: str


class Answers:
    """Judges the answers of one runner's kernel."""

    def __init__(self, runner: StepRunner) -> None:
        self._runner = runner
        self._kernel = runner.kernel
        self._machine = runner.kernel.machine
        self._cleared = bool(_CLEARED & set(runner.scenario.variants))
        self._mutex = self._machine.symbol("klp_mutex") + self._machine.layouts.offsetof("mutex", "owner")
        self._reads = any("read(" in line for each in runner.scenario.tasks.values() for line in each.program)

    def before(self, step: Step) -> Before:
        """How things stand, as far as the answer to this step depends on it."""
        self._kernel.patches.declared = None
        if step.action not in _RULES or self._machine.ftrace.disabled.get():
            return Before()
        logged, events = len(self._kernel.log), self._machine.events.total
        if step.action in (Action.RUN, Action.SPAWN):
            return Before(True, logged, events)
        klp = self._kernel.klp
        moving = klp.transition_patch
        name = self._module_of(step)
        references, is_live, stays = self._users_of(name)
        return Before(
            True,
            logged,
            events,
            frozenset(each for each in self._machine.modules.objects if each),
            tuple(map(self._listed, klp.patches())),
            "" if moving is None else klp.name_of(moving),
            self._on_stacks(),
            bool(self._machine.ftrace.enabled.get()),
            frozenset(self._runner.tracers),
            bool(klp.being_freed),
            references,
            is_live,
            stays,
            self._left(name) if step.action in (Action.LOAD, Action.MODPROBE) else frozenset(),
        )

    def judge(self, step: Step, before: Before, error: KlpemuError | None) -> Wrong | None:
        """Whether the answer to a step is wrong; an error that is no errno is for others to judge."""
        if not before.known or isinstance(error, FtraceBug):
            return None
        if error is not None and not isinstance(error, KernelErrno):
            return None
        rule, source = _RULES[step.action]
        right = rule(self, step, before, error)
        if right is None or self._is_over(before):
            return None
        answer = error.name if isinstance(error, KernelErrno) else ""
        if answer in right or (step.fail_alloc and (answer in NO_MEMORY or not answer)):
            return None
        said = f"was refused: {error}" if error is not None else "succeeded"
        wanted = " or ".join(sorted(each or "success" for each in right))
        return Wrong(f"it {said}; {source} has {wanted} here", min(right))

    # Livepatch.

    def _enable(self, step: Step, before: Before, error: KernelErrno | None) -> Errnos | None:
        """load_module() with the patch's code, and klp_enable_patch() in its init function."""
        patch = self._runner.scenario.patches[step.target]
        if patch.objects or patch.code is None:
            if patch.name in before.modules:
                return EXISTS
            return self._klp_enable_patch(patch, None, before) if self._was_asked(before, error) else None
        file = self._file(patch.code)
        return EXISTS if file.name in before.modules else self._init_livepatch(file, before, error)

    def _init_livepatch(self, file: ModuleFile, before: Before, error: KernelErrno | None) -> Errnos | None:
        """klp_enable_patch() as the module's init function has called it."""
        declared = self._kernel.patches.declared
        if declared is None or (error is not None and error is not self._kernel.patches.refused):
            return None  # refused by the loader, or by itself
        return self._klp_enable_patch(declared, file, before)

    def _klp_enable_patch(self, patch: Patch, file: ModuleFile | None, before: Before) -> Errnos | None:
        """klp_init_patch(), and then __klp_enable_patch(): no two transitions at once, klp_patch_object()."""
        if any(each.has_states for each in before.patches) or self._logged(before, "pre-patch callback"):
            return None
        if any(_twice(funcs) for funcs in patch.objects.values()):
            return EXISTS | INVALID
        loaded = [each for each in patch.objects if each == VMLINUX or each in before.modules]
        for each in loaded:
            if file is not None and not file.resolves(each, self._count):
                return INVALID
            if not all(is_chosen(self._count(each, func.old), func.sympos) for func in patch.objects[each]):
                return INVALID
        if before.transition:
            return BUSY
        wrong: Errnos = frozenset()
        for each in loaded:
            for func in patch.objects[each]:
                wrong |= self._klp_patch_func(each, func, before)
        return wrong or SUCCESS

    def _klp_patch_func(self, objname: str, func: Func, before: Before) -> Errnos:
        """klp_patch_func(): ftrace must have a site in the function (ftrace_location()), and be enabled, as
        the ops is PERMANENT.  Where another func is on the stack already, it was and is.
        """
        module = "" if objname == VMLINUX else objname
        symbol = self._machine.kallsyms.named(func.old, module)[max(func.sympos, 1) - 1]
        sites = self._machine.modules.objects[module].sites
        if not any(symbol.address <= each < symbol.address + symbol.size for each in sites):
            return INVALID
        return frozenset() if before.ftrace_enabled else BUSY

    def _disable(self, step: Step, before: Before, error: KernelErrno | None) -> Errnos | None:
        """enabled_store(): a patch that is not enabled stays so; one in transition turns around."""
        patch = self._patch(step, before)
        if patch is None:
            return None if before.being_freed else NO_ENTRY
        if not patch.enabled:
            return INVALID
        return BUSY if before.transition not in ("", patch.name) else SUCCESS

    def _reverse(self, step: Step, before: Before, error: KernelErrno | None) -> Errnos | None:
        """enabled_store() of the patch in transition, with the other value."""
        if self._patch(step, before) is None:
            return None if before.being_freed else NO_ENTRY
        return SUCCESS if before.transition == self._name(step) else INVALID

    def _force(self, step: Step, before: Before, error: KernelErrno | None) -> Errnos | None:
        """force_store(): the patch must be the one in transition."""
        return self._reverse(step, before, error)

    # Modules.

    def _load(self, step: Step, before: Before, error: KernelErrno | None) -> Errnos | None:
        """load_module(): a name is there once; klp_module_coming() applies each patch, oldest first."""
        file = self._file(step.target)
        if file.name in before.modules:
            return EXISTS
        return self._klp_module_coming(file, before) if self._was_asked(before, error) else None

    def _modprobe(self, step: Step, before: Before, error: KernelErrno | None) -> Errnos | None:
        """The same behind what kmod does: what is loaded is left alone, what it needs is loaded first."""
        file = self._file(step.target)
        if file.name in before.modules:
            return SUCCESS
        if "livepatch" in file.image.modinfo:
            return self._init_livepatch(file, before, error)
        alone = all(each in before.modules for each in depends_of(file.image))
        if not alone or not self._was_asked(before, error):
            return None
        right = self._klp_module_coming(file, before)
        if right == SUCCESS and not self._logged(before, f"refusing to load module '{file.name}'"):
            return None  # what else it says is its own
        return right

    def _klp_module_coming(self, file: ModuleFile, before: Before) -> Errnos | None:
        """klp_module_coming(): klp_init_object_loaded() and klp_patch_object() of each patch for it."""
        if self._logged(before, "pre-patch callback"):
            return None
        for patch in before.patches:
            if file.name not in patch.funcs:
                continue
            funcs = patch.funcs[file.name]
            wrong = NO_EXEC if patch.name in before.left and not self._cleared else frozenset[str]()
            if not all(is_chosen(file.count(name), sympos) for name, sympos in funcs) or not self._resolves(
                patch, file
            ):
                wrong |= INVALID
            if wrong:
                return wrong
            if not all(file.has_site(name, sympos) for name, sympos in funcs):
                wrong |= INVALID
            if funcs and not before.ftrace_enabled:
                wrong |= BUSY
            if wrong:
                return wrong
        return SUCCESS

    def _unload(self, step: Step, before: Before, error: KernelErrno | None) -> Errnos | None:
        """delete_module() without an exit function: nobody may have a reference."""
        if step.target not in before.modules:
            return NO_ENTRY
        return WOULD_BLOCK if before.references else SUCCESS

    def _rmmod(self, step: Step, before: Before, error: KernelErrno | None) -> Errnos | None:
        """delete_module(): nobody uses it, it is LIVE, and what has an init function has one for the exit."""
        if step.target not in before.modules:
            return NO_ENTRY
        wrong = WOULD_BLOCK if before.references else frozenset[str]()
        if not before.is_live or before.stays:
            wrong |= BUSY
        return wrong or SUCCESS

    # ftrace.

    def _ftrace(self, step: Step, before: Before, error: KernelErrno | None) -> Errnos | None:
        """ftrace_set_filter_ip() and register_ftrace_function() of an ops that redirects nothing."""
        return EXISTS if step.target in before.tracers else SUCCESS

    def _unftrace(self, step: Step, before: Before, error: KernelErrno | None) -> Errnos | None:
        """unregister_ftrace_function()."""
        return SUCCESS if step.target in before.tracers else NO_ENTRY

    def _write(self, step: Step, before: Before, error: KernelErrno | None) -> Errnos | None:
        """ftrace_enable_sysctl(): off only while no ops is PERMANENT, as those of livepatch are."""
        if step.target != FTRACE_ENABLED or step.value not in ("0", "1"):
            return None
        return BUSY if step.value == "0" and before.ftrace_enabled and before.on_stacks else SUCCESS

    def _succeeds(self, step: Step, before: Before, error: KernelErrno | None) -> Errnos | None:
        """No errno comes of letting time go by, but for what tasks read that may not be there."""
        return None if self._reads else SUCCESS

    # How things stand.

    def _patch(self, step: Step, before: Before) -> Listed | None:
        return next((each for each in before.patches if each.name == self._name(step)), None)

    def _name(self, step: Step) -> str:
        return self._runner.name_of(step.target)

    def _listed(self, patch: Any) -> Listed:
        """A patch of klp_patches as guest memory has it, nops included."""
        string = self._string
        funcs: dict[str, list[tuple[str, int]]] = {}
        for obj in list_for_each_entry(patch.obj_list, "klp_object", "node"):
            funcs[string(obj.name) if obj.name else VMLINUX] = [
                (string(each.old_name), each.old_sympos)
                for each in list_for_each_entry(obj.func_list, "klp_func", "node")
            ]
        name = self._kernel.klp.name_of(patch)
        return Listed(name, bool(patch.enabled), bool(patch.states), funcs)

    def _on_stacks(self) -> frozenset[int]:
        """The addresses of the functions that are patched: those with a klp_ops."""
        found = set[int]()
        for ops in self._kernel.klp.ops():
            top = next(list_for_each_entry(ops.func_stack, "klp_func", "stack_node"), None)
            if top is not None:
                found.add(top.old_func)
        return frozenset(found)

    def _module_of(self, step: Step) -> str:
        """The name of the module that a step is about."""
        if step.action in (Action.LOAD, Action.MODPROBE):
            return self._file(step.target).name
        return step.target if step.action in (Action.UNLOAD, Action.RMMOD) else ""

    def _users_of(self, name: str) -> tuple[int, bool, bool]:
        """The references that others have of a module, whether it is LIVE, and whether it stays for ever."""
        loaded = self._machine.modules.objects.get(name) if name else None
        if loaded is None:
            return 0, True, False
        module = self._machine.view("module", loaded.struct)
        is_live = module.state == ModuleState.LIVE
        return module.refcnt.counter - 1, is_live, bool(module.init and not module.exit)

    def _left(self, name: str) -> frozenset[str]:
        """The patches with a klp relocation for that module whose target is not zero (relocate_entries of
        apply_relocate_add() refuses it).
        """
        found = set[str]()
        for patch in self._kernel.klp.patches():
            owner = self._kernel.klp.name_of(patch)
            placement = self._machine.modules.objects[owner].placement
            targets = ModuleFile.of(placement.image).targets(name)
            if any(
                any(self._machine.space.read(placement.addresses[section] + offset, size))
                for section, offset, size in targets
            ):
                found.add(owner)
        return frozenset(found)

    def _resolves(self, patch: Listed, file: ModuleFile) -> bool:
        """The klp relocations of a patch that are for a module that comes have their symbols."""
        placement = self._machine.modules.objects[patch.name].placement

        def count(objname: str, name: str) -> int:
            return file.count(name) if objname == file.name else self._count(objname, name)

        return ModuleFile.of(placement.image).resolves(file.name, count)

    def _count(self, objname: str, name: str) -> int:
        """How many symbols of that name an object has."""
        return len(self._machine.kallsyms.named(name, "" if objname == VMLINUX else objname))

    def _file(self, target: str | PathLike[str]) -> ModuleFile:
        return ModuleFile.open(locate(fspath(target), self._runner.scenario.base))

    def _is_over(self, before: Before) -> bool:
        """The transition that was on has ended meanwhile, before the answer or behind it."""
        return bool(before.transition) and any(
            self._logged(before, f"'{before.transition}': {direction} complete")
            for direction in ("patching", "unpatching")
        )

    def _logged(self, before: Before, text: str) -> bool:
        return any(text in line for line in self._kernel.log[before.logged :])

    def _string(self, address: int) -> str:
        return read_string(self._machine.space, address)

    def _was_asked(self, before: Before, error: KernelErrno | None) -> bool:
        """Whether livepatch was asked: klp_mutex was taken.  What the loader refuses itself is its own."""
        taken = self._machine.init_task.struct.to_bytes(8, "little")
        return error is None or any(
            each.kind is EventKind.STORE and each.address == self._mutex and each.after == taken
            for each in self._machine.events.since(before.events)
        )


def _twice(funcs: Sequence[Func]) -> bool:
    """Two funcs of one name and position: sysfs has a directory for each (klp_init_func())."""
    return len({(each.old, each.sympos or 1) for each in funcs}) < len(funcs)


_Rule = Callable[[Answers, Step, Before, KernelErrno | None], Errnos | None]
# By operation: the rule, and whose it is.
_RULES: Final[dict[Action, tuple[_Rule, str]]] = {
    Action.ENABLE: (Answers._enable, "klp_enable_patch()"),
    Action.DISABLE: (Answers._disable, "enabled_store()"),
    Action.REVERSE: (Answers._reverse, "enabled_store()"),
    Action.FORCE: (Answers._force, "force_store()"),
    Action.LOAD: (Answers._load, "klp_module_coming()"),
    Action.MODPROBE: (Answers._modprobe, "klp_module_coming()"),
    Action.UNLOAD: (Answers._unload, "delete_module()"),
    Action.RMMOD: (Answers._rmmod, "delete_module()"),
    Action.FTRACE: (Answers._ftrace, "register_ftrace_function()"),
    Action.UNFTRACE: (Answers._unftrace, "unregister_ftrace_function()"),
    Action.WRITE: (Answers._write, "ftrace_enable_sysctl()"),
    Action.RUN: (Answers._succeeds, "nothing that goes on by itself"),
    Action.SPAWN: (Answers._succeeds, "nothing that goes on by itself"),
}
