"""Lists: each is circular, agrees with itself in both directions, and holds what the patches ask for, in order."""

from collections.abc import Iterator

from emu.memory import MemoryFault, read_string
from patches.invariants.finding import Finding
from patches.invariants.subject import Subject

__all__ = ["func_stacks_hold_the_patches", "lists_are_well_formed", "patches_are_listed"]

LONGEST_LIST = 1 << 20
GLOBAL_LISTS = ("klp_patches", "klp_ops", "modules", "ftrace_ops_trampoline_list")


def lists_are_well_formed(subject: Subject) -> Iterator[Finding | None]:
    """Every list of the patch core can be walked both ways and gives the same entries."""
    heads = [(name, subject.symbols[name]) for name in GLOBAL_LISTS if name in subject.symbols]
    heads.append(("init_task.tasks", subject.symbols["init_task"] + subject.layouts.offsetof("task_struct", "tasks")))
    heads += _nested_heads(subject)
    for name, head in heads:
        yield _check(subject, name, head)
    yield _check_ops_list(subject)


def patches_are_listed(subject: Subject) -> Iterator[Finding | None]:
    """klp_patches holds the enabled patches, oldest first, and nothing is in transition between two steps."""
    names = []
    for address in _entries(subject, subject.symbols["klp_patches"], "klp_patch", "list"):
        patch = subject.view("klp_patch", address)
        try:
            names.append(_module_name(subject, patch.mod))
        except MemoryFault:
            names.append(f"{address:#x}")
    if names != list(subject.patches):
        wanted = ", ".join(subject.patches) or "nothing"
        what = f"klp_patches holds {', '.join(names) or 'nothing'}, enabled are {wanted}"
        yield Finding("patches_are_listed", what, subject.symbols["klp_patches"], "klp_patches")
    else:
        yield None


def func_stacks_hold_the_patches(subject: Subject) -> Iterator[Finding | None]:
    """Each patched function has one klp_ops, whose func_stack holds its patches' funcs, newest on top."""
    expected = {function.address: function for function in subject.functions}
    found: dict[int, tuple[int | None, ...]] = {}
    for address in _entries(subject, subject.symbols["klp_ops"], "klp_ops", "node"):
        head = address + subject.layouts.offsetof("klp_ops", "func_stack")
        funcs = [subject.view("klp_func", each) for each in _entries(subject, head, "klp_func", "stack_node")]
        try:
            stack = tuple(None if func.nop else func.new_func for func in funcs)
            old = {func.old_func for func in funcs}
            moving = [func for func in funcs if func.transition]
        except MemoryFault:
            yield Finding("func_stacks_hold_the_patches", "a func_stack leads to no func", head)
            continue
        if len(old) != 1:
            yield Finding("func_stacks_hold_the_patches", "a func_stack is empty or mixes functions", head)
            continue
        if moving and not subject.pointer("klp_transition_patch"):
            what = "a func is marked as in transition, no transition is on"
            where = subject.kallsyms.describe(moving[0].old_func)
            yield Finding("func_stacks_hold_the_patches", what, moving[0].address_, where)
        found[old.pop()] = stack
    for address in sorted(expected.keys() | found.keys()):
        wanted = expected[address].stack if address in expected else ()
        if found.get(address, ()) == wanted:
            yield None
            continue
        what = f"func_stack is {_show(subject, found.get(address, ()))}, expected {_show(subject, wanted)}"
        yield Finding("func_stacks_hold_the_patches", what, address, subject.kallsyms.describe(address))


def _nested_heads(subject: Subject) -> Iterator[tuple[str, int]]:
    offset = subject.layouts.offsetof
    for address in _entries(subject, subject.symbols["klp_ops"], "klp_ops", "node"):
        yield "func_stack", address + offset("klp_ops", "func_stack")
    for address in _entries(subject, subject.symbols["klp_patches"], "klp_patch", "list"):
        objects = address + offset("klp_patch", "obj_list")
        yield "obj_list", objects
        for obj in _entries(subject, objects, "klp_object", "node"):
            yield "func_list", obj + offset("klp_object", "func_list")


def _entries(subject: Subject, head: int, struct: str, member: str) -> list[int]:
    """Addresses of the structs on a list, as far as it can be walked forwards."""
    offset = subject.layouts.offsetof(struct, member)
    found: list[int] = []
    try:
        at = int.from_bytes(subject.memory.read(head, 8), "little")
        while at != head and len(found) < LONGEST_LIST:
            found.append(at - offset)
            at = int.from_bytes(subject.memory.read(at, 8), "little")
            if len(found) > 1 and at - offset == found[0]:
                break
    except MemoryFault:
        pass
    return found


def _check(subject: Subject, name: str, head: int) -> Finding | None:
    seen: set[int] = set()
    at = head
    try:
        while True:
            following = int.from_bytes(subject.memory.read(at, 8), "little")
            back = int.from_bytes(subject.memory.read(following + 8, 8), "little")
            if back != at:
                what = f"{name}: {at:#x}.next is {following:#x}, whose prev is {back:#x}"
                return Finding("lists_are_well_formed", what, at, subject.kallsyms.describe(at))
            at = following
            if at == head:
                return None
            if at in seen or len(seen) > LONGEST_LIST:
                return Finding("lists_are_well_formed", f"{name} does not come back to its head", at)
            seen.add(at)
    except MemoryFault:
        what = f"{name}: the entry at {at:#x} points to unmapped memory"
        return Finding("lists_are_well_formed", what, at, subject.kallsyms.describe(at))


def _check_ops_list(subject: Subject) -> Finding | None:
    """ftrace_ops_list is singly linked: it must end at ftrace_list_end."""
    at, seen = subject.pointer("ftrace_ops_list"), set[int]()
    end = subject.symbols["ftrace_list_end"]
    offset = subject.layouts.offsetof("ftrace_ops", "next")
    try:
        while at != end:
            if at in seen:
                return Finding("lists_are_well_formed", "ftrace_ops_list goes in a circle", at)
            seen.add(at)
            at = int.from_bytes(subject.memory.read(at + offset, 8), "little")
    except MemoryFault:
        return Finding("lists_are_well_formed", f"ftrace_ops_list leads to unmapped {at:#x}", at)
    return None


def _module_name(subject: Subject, address: int) -> str:
    return read_string(subject.memory, address + subject.layouts.offsetof("module", "name"))


def _show(subject: Subject, stack: tuple[int | None, ...]) -> str:
    names = ["nop" if each is None else subject.kallsyms.describe(each).split("+")[0] for each in stack]
    return f"[{', '.join(names)}]"
