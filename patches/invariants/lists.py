"""Lists: each is circular, agrees with itself in both directions, and holds what the patches ask for, in
order.
"""

from collections.abc import Iterator
from typing import Any

from elf.errors import KlpemuError
from emu.memory import MemoryFault, read_string, read_u64
from patches.invariants.finding import Finding, value_finding
from patches.invariants.subject import Subject
from patches.invariants.walk import broken_links, entries

__all__ = ["func_stacks_hold_the_patches", "lists_are_well_formed", "patches_are_listed"]

GLOBAL_LISTS = ("klp_patches", "klp_ops", "modules", "ftrace_ops_trampoline_list")


def lists_are_well_formed(subject: Subject) -> Iterator[Finding | None]:
    """Every list of the patch core and of ftrace can be walked, both ways where it has two, to the same
    entries.

    Source: include/linux/list.h and rculist.h; add_ftrace_ops() of kernel/trace/ftrace.c.
    """
    invariant = "lists_are_well_formed"
    for name, head in _heads(subject):
        broken = list(broken_links(subject, head))
        for at, found, wanted in broken:
            what = f"a link of {name} leads to {found:#x}, expected {wanted:#x}"
            yield value_finding(invariant, what, at, subject.place(at), wanted, found)
        if not broken:
            yield None
    for damage in subject.ftrace.list_damage:
        yield Finding(invariant, damage.what, damage.address, subject.place(damage.address))
    yield from _ops_are_registered(subject)


def patches_are_listed(subject: Subject) -> Iterator[Finding | None]:
    """klp_patches holds the enabled patches, oldest first; the transition that is on, if any, is one of
    theirs.

    Source: klp_init_patch() and klp_free_patch_start() of kernel/livepatch/core.c.
    """
    invariant = "patches_are_listed"
    listed = entries(subject, subject.symbols["klp_patches"], "klp_patch", "list")
    names = [_patch_name(subject, address) for address in listed]
    if names != list(subject.patches):
        wanted = ", ".join(subject.patches) or "nothing"
        what = f"klp_patches holds {', '.join(names) or 'nothing'}, enabled are {wanted}"
        yield Finding(invariant, what, subject.symbols["klp_patches"], "klp_patches")
    else:
        yield None
    transition = subject.pointer("klp_transition_patch")
    if transition and transition not in listed:
        what = "klp_transition_patch is none of the patches"
        at = subject.symbols["klp_transition_patch"]
        yield value_finding(invariant, what, at, subject.place(at), 0, transition)
    else:
        yield None


def func_stacks_hold_the_patches(subject: Subject) -> Iterator[Finding | None]:
    """Each patched function has one klp_ops, whose func_stack holds its patches' funcs, newest on top.

    Source: klp_patch_func() and klp_unpatch_func() of kernel/livepatch/patch.c; d697bad588 ("livepatch:
    Remove Nop structures when unused") (in v5.1).
    """
    invariant = "func_stacks_hold_the_patches"
    expected = {function.address: function for function in subject.functions}
    found: dict[int, tuple[int | None, ...]] = {}
    for address in entries(subject, subject.symbols["klp_ops"], "klp_ops", "node"):
        head = address + subject.layouts.offsetof("klp_ops", "func_stack")
        funcs = [subject.view("klp_func", each) for each in entries(subject, head, "klp_func", "stack_node")]
        try:
            stack = tuple(None if func.nop else func.new_func for func in funcs)
            olds = [func.old_func for func in funcs]
            yield from _flags_hold(subject, funcs)
        except MemoryFault:
            yield Finding(invariant, "a func_stack leads to no func", head, subject.place(head))
            continue
        if len(set(olds)) != 1 or olds[0] in found:
            names = ", ".join(subject.place(old) for old in olds) or "nothing"
            what = f"a func_stack is that of one function and the only one for it, this one holds {names}"
            yield Finding(invariant, what, head, subject.place(head))
            continue
        found[olds[0]] = stack
    for address in sorted(expected.keys() | found.keys()):
        wanted = expected[address].stack if address in expected else ()
        if found.get(address, ()) == wanted:
            yield None
            continue
        what = f"func_stack is {_show(subject, found.get(address, ()))}, expected {_show(subject, wanted)}"
        yield Finding(invariant, what, address, subject.place(address))


def _flags_hold(subject: Subject, funcs: list[Any]) -> Iterator[Finding | None]:
    """What is on a func_stack is `patched`, and in transition only if its patch is."""
    for func in funcs:
        if not func.patched:
            at = func.member_("patched")
            what = f"a func of {subject.place(func.old_func)} is on its func_stack and not marked as patched"
            yield value_finding("func_stacks_hold_the_patches", what, at, subject.place(at), 1, 0, 1)
        if func.transition and not subject.pointer("klp_transition_patch"):
            at = func.member_("transition")
            what = f"a func of {subject.place(func.old_func)} is marked as in transition, no transition is on"
            yield value_finding("func_stacks_hold_the_patches", what, at, subject.place(at), 0, 1, 1)


def _heads(subject: Subject) -> Iterator[tuple[str, int]]:
    """Name and address of every list head there is."""
    offset, symbols = subject.layouts.offsetof, subject.symbols
    yield from ((name, symbols[name]) for name in GLOBAL_LISTS if name in symbols)
    yield "init_task.tasks", symbols["init_task"] + offset("task_struct", "tasks")
    for address in entries(subject, symbols["klp_ops"], "klp_ops", "node"):
        yield "a func_stack", address + offset("klp_ops", "func_stack")
    for address in entries(subject, symbols["klp_patches"], "klp_patch", "list"):
        objects = address + offset("klp_patch", "obj_list")
        yield "an obj_list", objects
        for obj in entries(subject, objects, "klp_object", "node"):
            yield "a func_list", obj + offset("klp_object", "func_list")


def _ops_are_registered(subject: Subject) -> Iterator[Finding | None]:
    """The ops of every klp_ops is on ftrace_ops_list, and says of itself that it is enabled."""
    registered = {each.ops.address_ for each in subject.ftrace.ops}
    offset = subject.layouts.offsetof("klp_ops", "fops")
    for address in entries(subject, subject.symbols["klp_ops"], "klp_ops", "node"):
        ops = subject.view("ftrace_ops", address + offset)
        if ops.address_ in registered:
            yield None
        else:
            what = "the ftrace_ops of a klp_ops is not on ftrace_ops_list"
            yield Finding("lists_are_well_formed", what, ops.address_, subject.place(ops.address_))


def _patch_name(subject: Subject, address: int) -> str:
    """A patch is called as its module."""
    try:
        module = read_u64(subject.memory, address + subject.layouts.offsetof("klp_patch", "mod"))
        return read_string(subject.memory, module + subject.layouts.offsetof("module", "name"))
    except KlpemuError:
        return f"{address:#x}"


def _show(subject: Subject, stack: tuple[int | None, ...]) -> str:
    names = ["nop" if each is None else subject.place(each).split("+")[0] for each in stack]
    return f"[{', '.join(names)}]"
