"""struct module in guest memory: its states, its name, and the place of each part (kernel/module/main.c)."""

import enum
import errno
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from elf.image import Image
from elf.section import Section
from emu.errno import KernelErrno
from emu.list import init_list_head
from emu.paging import Access
from emu.placement import Placement

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = [
    "MODULE_NAME_LEN",
    "THIS_MODULE",
    "ModuleState",
    "Taint",
    "check_modinfo",
    "check_this_module",
    "find_module_sections",
    "forget_init_layout",
    "license_is_gpl_compatible",
    "set_layouts",
    "struct_name",
    "taint_of",
]

MODULE_NAME_LEN = 56  # include/linux/module.h
THIS_MODULE = ".gnu.linkonce.this_module"


class ModuleState(enum.IntEnum):
    """enum module_state (include/linux/module.h)."""

    LIVE = 0
    COMING = 1
    GOING = 2
    UNFORMED = 3


class Taint(enum.IntEnum):
    """Bits of `taints` (include/linux/panic.h)."""

    PROPRIETARY_MODULE = 0
    CRAP = 10
    OOT_MODULE = 12
    UNSIGNED_MODULE = 13
    LIVEPATCH = 15
    TEST = 18


# Section; member with its address; member with the number of elements; bytes of an element.
_TABLES: Final = (
    ("__param", "kp", "num_kp", 40),
    ("__ksymtab", "syms", "num_syms", 12),
    ("__kcrctab", "crcs", "", 4),
    ("__ksymtab_gpl", "gpl_syms", "num_gpl_syms", 12),
    ("__kcrctab_gpl", "gpl_crcs", "", 4),
    (".noinstr.text", "noinstr_text_start", "noinstr_text_size", 1),
    ("__tracepoints_ptrs", "tracepoints_ptrs", "num_tracepoints", 4),
    ("___srcu_struct_ptrs", "srcu_struct_ptrs", "num_srcu_structs", 8),
    ("__bpf_raw_tp_map", "bpf_raw_events", "num_bpf_raw_events", 32),
    ("__jump_table", "jump_entries", "num_jump_entries", 16),
    ("_ftrace_events", "trace_events", "num_trace_events", 8),
    ("_ftrace_eval_map", "trace_evals", "num_trace_evals", 8),
    ("__trace_printk_fmt", "trace_bprintk_fmt_start", "num_trace_bprintk_fmt", 8),
    ("__mcount_loc", "ftrace_callsites", "num_ftrace_callsites", 8),
    (".kprobes.text", "kprobes_text_start", "kprobes_text_size", 1),
    ("_kprobe_blacklist", "kprobe_blacklist", "num_kprobe_blacklist", 8),
    (".static_call_sites", "static_call_sites", "num_static_call_sites", 8),
    ("__ex_table", "extable", "num_exentries", 12),
)
_BUG_ENTRY: Final = 12  # struct bug_entry, CONFIG_DEBUG_BUGVERBOSE with relative pointers
_ORC_ENTRY: Final = 6

_GPL_COMPATIBLE: Final = (
    "GPL",
    "GPL v2",
    "GPL and additional rights",
    "Dual BSD/GPL",
    "Dual MIT/GPL",
    "Dual MPL/GPL",
)


def license_is_gpl_compatible(text: str) -> bool:
    """include/linux/license.h."""
    return text in _GPL_COMPATIBLE


def struct_name(module: Any) -> str:
    """The name in a struct module."""
    name: bytes = module.name
    return name.split(b"\0")[0].decode("ascii", "backslashreplace")


def check_this_module(image: Image, size: int) -> Section | None:
    """The section with the module's own struct module; None for an object that is no module.

    ENOEXEC if it is not of `size` bytes, those that this kernel's has.  6.1 relies on the version of the
    symbol module_layout there; what is said is what later kernels say.
    """
    section = next((each for each in image.sections if each.name == THIS_MODULE and each.is_alloc), None)
    if section is not None and (section.size != size or section.is_nobits):
        raise KernelErrno(
            errno.ENOEXEC,
            f"{THIS_MODULE} section size must match the kernel's built struct module size at run time: "
            f"it has {section.size} bytes, struct module {size}",
            where=image.path,
            advice="build the module for this kernel",
        )
    return section


def find_module_sections(module: Any, placement: Placement) -> None:
    """Enter where the tables of the module are that the kernel's parts look at."""
    for name, at, count, size in _TABLES:
        section = _find(placement, name)
        setattr(module, at, placement.addresses[section.index] if section else 0)
        if count:
            setattr(module, count, section.size // size if section else 0)
    bugs = _find(placement, "__bug_table")
    module.bug_table = placement.addresses[bugs.index] if bugs else 0
    module.num_bugs = bugs.size // _BUG_ENTRY if bugs else 0
    init_list_head(module.bug_list)
    rows, where = _find(placement, ".orc_unwind"), _find(placement, ".orc_unwind_ip")
    if rows and where:
        module.arch.num_orcs = rows.size // _ORC_ENTRY
        module.arch.orc_unwind = placement.addresses[rows.index]
        module.arch.orc_unwind_ip = placement.addresses[where.index]
    if placement.per_cpu:
        module.percpu = placement.addresses[placement.per_cpu[0].index]
        module.percpu_size = placement.per_cpu[0].size


def set_layouts(module: Any, placement: Placement) -> None:
    """Enter the module's memory; without own type for the last members, they count from the layout's base."""
    for layout, base, size, init in (
        (module.core_layout, placement.base, placement.size, False),
        (module.init_layout, placement.init_base, placement.init_size, True),
    ):
        layout.base = base
        layout.size = size
        layout.text_size = placement.span(init=init, accesses=[Access.EXECUTE])
        read_only = (Access.EXECUTE, Access.READ)
        layout.ro_size = placement.span(init=init, accesses=read_only)
        later = [each.start + each.size for each in placement.groups if each.ro_after_init and not init]
        layout.ro_after_init_size = max(later) - base if later else layout.ro_size
        layout.mtn.mod = module.address_


def forget_init_layout(module: Any) -> None:
    """What is freed after init is no part of the module any more."""
    layout = module.init_layout
    layout.base = layout.size = layout.ro_size = layout.ro_after_init_size = layout.text_size = 0


def taint_of(bits: Iterable[Taint]) -> int:
    """The bits as they stand in `taints`."""
    return sum(1 << bit for bit in set(bits))


def check_modinfo(machine: "Machine", image: Image, name: str, tainted: set[Taint]) -> set[Taint]:
    """What the module's .modinfo makes of the kernel; `tainted` is what it has been made before.

    The version magic is not compared: a module for another 6.1 can be looked at.  Nor is a signature judged,
    only missed, as a kernel with CONFIG_MODULE_SIG misses it.  A linked image tells of each taint once, as a
    kernel does; the built-in kernel, which nobody will be asked to support, only of the licence's.
    """
    info = image.modinfo
    found: set[Taint] = set()
    tells = machine.vmlinux.placement.is_linked
    if "intree" not in info:
        if tells and Taint.OOT_MODULE not in tainted:
            machine.log.pr_warn(f"{name}: loading out-of-tree module taints kernel.")
        found.add(Taint.OOT_MODULE)
    if "staging" in info:
        if tells:
            text = "module is from the staging directory, the quality is unknown, you have been warned."
            machine.log.pr_warn(f"{name}: {text}")
        found.add(Taint.CRAP)
    if "livepatch" in info:
        if tells and Taint.LIVEPATCH not in tainted:
            machine.log.pr_notice(f"{name}: tainting kernel with TAINT_LIVEPATCH")
        found.add(Taint.LIVEPATCH)
    text = info.get("license", ["unspecified"])[0]
    if not license_is_gpl_compatible(text):
        if Taint.PROPRIETARY_MODULE not in tainted:
            machine.log.pr_warn(f"{name}: module license '{text}' taints kernel.")
        found.add(Taint.PROPRIETARY_MODULE)
    if "test" in info:
        if tells and Taint.TEST not in tainted:
            machine.log.pr_warn(f"{name}: loading test module taints kernel.")
        found.add(Taint.TEST)
    if not image.is_signed:
        if tells and Taint.UNSIGNED_MODULE not in tainted:
            machine.log.pr_notice(
                f"{name}: module verification failed: signature and/or required key missing - tainting kernel"
            )
        found.add(Taint.UNSIGNED_MODULE)
    return found


def _find(placement: Placement, name: str) -> Section | None:
    """find_sec(): the first allocated section of that name that is loaded."""
    return next(
        (
            each
            for each in placement.image.sections
            if each.name == name and each.index in placement.addresses
        ),
        None,
    )
