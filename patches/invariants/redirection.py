"""Who redirects a function: one ops for it, one handler that says where a call goes, the newest patch."""

from collections import Counter
from collections.abc import Iterator

from elf.errors import KlpemuError
from emu.memory import read_string
from patches.invariants.finding import Finding, value_finding
from patches.invariants.subject import Subject
from patches.invariants.walk import entries

__all__ = ["ipmodify_is_exclusive", "newest_wins", "objects_know_their_modules", "one_ops_per_function"]

IPMODIFY = 1 << 12


def one_ops_per_function(subject: Subject) -> Iterator[Finding | None]:
    """A function has at most one klp_ops, whatever the number of patches for it.

    Source: klp_find_ops() of kernel/livepatch/patch.c; 3c33f5b99d68 ("livepatch: support for repatching a
    function").
    """
    functions = Counter[int]()
    for address in entries(subject, subject.symbols["klp_ops"], "klp_ops", "node"):
        head = address + subject.layouts.offsetof("klp_ops", "func_stack")
        for first in entries(subject, head, "klp_func", "stack_node")[:1]:
            functions[subject.view("klp_func", first).old_func] += 1
    for function, count in functions.items():
        if count == 1:
            yield None
        else:
            what = f"{count} klp_ops are there for one function"
            yield Finding("one_ops_per_function", what, function, subject.place(function))


def ipmodify_is_exclusive(subject: Subject) -> Iterator[Finding | None]:
    """Of the registered ops that want a site at most one has FTRACE_OPS_FL_IPMODIFY: it may say where a call
    goes.

    Source: __ftrace_hash_update_ipmodify() of kernel/trace/ftrace.c.
    """
    users = Counter(ip for each in subject.ftrace.ops if each.ops.flags & IPMODIFY for ip in each.addresses)
    for ip, count in users.items():
        if count == 1:
            yield None
        else:
            yield Finding(
                "ipmodify_is_exclusive", f"{count} ops may redirect one site", ip, subject.place(ip)
            )


def newest_wins(subject: Subject) -> Iterator[Finding | None]:
    """On every func_stack the funcs of newer patches are above those of older ones.

    Source: klp_patch_func(), which adds on top, and klp_ftrace_handler(), which takes the first; "func_stack"
    in Documentation/livepatch/livepatch.rst.
    """
    age = {
        func: number
        for number, patch in enumerate(_patches(subject))
        for obj in _objects(subject, patch)
        for func in entries(
            subject, obj + subject.layouts.offsetof("klp_object", "func_list"), "klp_func", "node"
        )
    }
    for address in entries(subject, subject.symbols["klp_ops"], "klp_ops", "node"):
        head = address + subject.layouts.offsetof("klp_ops", "func_stack")
        ages = [age.get(func, -1) for func in entries(subject, head, "klp_func", "stack_node")]
        if ages == sorted(ages, reverse=True):
            yield None
        else:
            what = f"the funcs on a func_stack are of the patches {ages}, counted from the oldest"
            yield Finding("newest_wins", what, head, subject.place(head))


def objects_know_their_modules(subject: Subject) -> Iterator[Finding | None]:
    """An object of an enabled patch says which module it is about: the loaded one of its name, or none.

    Source: klp_module_coming() and klp_free_object_loaded() of kernel/livepatch/core.c; 4ff96fb52c69
    ("livepatch: Nullify obj->mod in klp_module_coming()'s error path").
    """
    view, memory = subject.view, subject.memory
    name_at = subject.layouts.offsetof("module", "name")
    modules = entries(subject, subject.symbols["modules"], "module", "list")
    loaded = {read_string(memory, at + name_at): at for at in modules if view("module", at).klp_alive}
    for patch in _patches(subject):
        for address in _objects(subject, patch):
            obj = view("klp_object", address)
            if not obj.name:
                continue
            name = read_string(memory, obj.name)
            wanted = loaded.get(name, 0)
            if obj.mod == wanted:
                yield None
                continue
            at = obj.member_("mod")
            what = f"the object '{name}' of a patch says that its module is {_module(subject, obj.mod)}"
            yield value_finding("objects_know_their_modules", what, at, subject.place(at), wanted, obj.mod)


def _patches(subject: Subject) -> list[int]:
    return entries(subject, subject.symbols["klp_patches"], "klp_patch", "list")


def _objects(subject: Subject, patch: int) -> list[int]:
    return entries(subject, patch + subject.layouts.offsetof("klp_patch", "obj_list"), "klp_object", "node")


def _module(subject: Subject, address: int) -> str:
    if not address:
        return "not loaded"
    try:
        return f"'{read_string(subject.memory, address + subject.layouts.offsetof('module', 'name'))}'"
    except KlpemuError:
        return f"at {address:#x}, where there is none"
