"""Which functions of a linked kernel image Python answers, and how a call of one gets to Python.

A kernel function that Python answers keeps its symbol and its fentry site, so that a patch of it works; a
jump to its exit stub takes the place of its body.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from elf.errors import ElfError
from emu.text_image import TextImage
from emu.text_poke import INSN_SIZE, JMP32_OPCODE, text_gen_insn

if TYPE_CHECKING:
    from emu.start_kernel import LinkedImage

__all__ = ["NEEDS_A_SYSTEM", "image_runs", "replace_bodies"]

# What Python answers for the built-in kernel, and a linked image does itself: it needs memory and CPU only.
# fmt: off
IMAGE_RUNS = frozenset((
    "__SCT__cond_resched", "__SCT__might_resched", "__dynamic_pr_debug", "__get_task_comm",
    "__init_swait_queue_head",
    "__init_waitqueue_head", "__list_add_valid", "__list_del_entry_valid", "__msecs_to_jiffies",
    "__mutex_init", "completion_done", "init_timer_key", "init_wait_entry", "jiffies_to_msecs",
    "jiffies_to_usecs", "kasprintf", "kstrdup", "kstrtoint", "kstrtoll", "kstrtouint", "kstrtoull",
    "kvasprintf", "mutex_is_locked", "round_jiffies_relative", "scnprintf", "seq_printf",
    "seq_put_decimal_ull", "seq_putc", "seq_puts", "seq_vprintf", "seq_write", "snprintf", "sprintf",
    "strchr", "strcmp", "strcpy", "strlcpy", "strncmp", "strncpy", "strnlen", "strrchr", "strscpy",
    "strstr", "vscnprintf", "vsnprintf",
))
# fmt: on
# The functions of kernel_param_ops (kernel/params.c).
PARAMETERS = ("param_array_", "param_free_", "param_get_", "param_set_")
# What an image has and nobody can answer: a call of it is refused, by its name and the caller's, before it
# goes astray in a kernel whose scheduler, page allocator, devices and RCU never came up.
# fmt: off
NEEDS_A_SYSTEM = (
    "__alloc_pages", "__request_module", "__schedule", "__vmalloc_node_range", "call_rcu",
    "call_usermodehelper_exec", "device_add", "do_exit", "filp_open", "kernel_clone",
    "kthread_create_on_node", "panic", "register_netdevice", "request_threaded_irq",
    "smp_call_function_many_cond", "synchronize_rcu",
)
# fmt: on


def image_runs(name: str) -> bool:
    """A linked image runs that function itself, although Python could answer it."""
    return name in IMAGE_RUNS or name.startswith(PARAMETERS)


def replace_bodies(
    text: TextImage, linked: "LinkedImage", labels: Mapping[str, int], sites: set[int]
) -> set[str]:
    """A jump to its stub behind the fentry site of each function that Python answers; returns which."""
    replaced = set()
    for name, stub in labels.items():
        address = linked.first_addresses.get(name)
        if address is None:
            continue
        at = next((site + INSN_SIZE for site in (address, address + 4) if site in sites), address)
        if at + INSN_SIZE > linked.symbols.end_of(address):
            raise ElfError(f"{name} is too small for a jump", where=linked.image.path)
        text.write(at, text_gen_insn(JMP32_OPCODE, at, stub))
        replaced.add(name)
    return replaced
