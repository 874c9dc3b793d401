"""klp_ftrace_handler: the machine code that decides, at each call, which version of a function runs.

The trampoline passes the ops it belongs to; the ops lies inside a `struct klp_ops`, whose func_stack has the
newest func on top.  The handler takes that func, or the one below if a transition is on and the task has not
switched yet, and writes where the call shall return to into the saved registers (klp_ftrace_handler() of
kernel/livepatch/patch.c).  A nop func, or no older func at all, leaves the original to run.

It calls nothing and keeps rbp as a frame pointer, so that a stack can be walked through it.
"""

from emu.assembly import Code
from emu.ftrace_64 import append_recursion_retry, append_recursion_trylock, recursion_unlock
from emu.view import Layouts

__all__ = ["KLP_PATCHED", "KLP_UNDEFINED", "KLP_UNPATCHED", "append_klp_ftrace_handler"]

KLP_UNDEFINED = -1
KLP_UNPATCHED = 0
KLP_PATCHED = 1


def append_klp_ftrace_handler(
    code: Code, layouts: Layouts, per_cpu: dict[str, int], fixups: dict[int, str]
) -> None:
    """Append klp_ftrace_handler(ip, parent_ip, fops, fregs).

    rax is current, r10 &ops->func_stack, r11 the stack_node looked at, r8 the recursion bit's mask.  Each
    WARN_ON_ONCE is a `ud2`; execution goes on behind it, as in the kernel.
    """
    stack_head = layouts.offsetof("klp_ops", "func_stack") - layouts.offsetof("klp_ops", "fops")
    node = layouts.offsetof("klp_func", "stack_node")
    func = {name: layouts.offsetof("klp_func", name) - node for name in ("nop", "transition", "new_func")}
    patch_state = layouts.offsetof("task_struct", "patch_state")
    ip = layouts.offsetof("pt_regs", "ip")

    code.align(16).label("klp_ftrace_handler").asm("push rbp\n mov rbp, rsp")
    lock = append_recursion_trylock(code, layouts, "TRACE_FTRACE_START", per_cpu)
    code.asm(f"lea r10, [rdx + {stack_head}]\n mov r11, [r10]\n cmp r11, r10")
    empty = code.jump("je")
    code.asm(f"cmp byte ptr [r11 + {func['transition']}], 0")
    moving = code.jump("jne")
    settled = len(code.bytes)
    code.asm(f"cmp byte ptr [r11 + {func['nop']}], 0")
    nop = code.jump("jne")
    code.asm(f"mov r9, [r11 + {func['new_func']}]\n mov [rcx + {ip}], r9")
    code.land(nop)
    unlock = len(code.bytes)
    code.asm(recursion_unlock(layouts, per_cpu, "r8"))
    code.asm("pop rbp\n ret")

    # In transition: a task that has not switched yet takes the func below, or the original.
    code.land(moving)
    code.asm(f"mov r9d, [rax + {patch_state}]\n cmp r9d, {KLP_UNDEFINED}")
    defined = code.jump("jne")
    code.warn("a func is in transition, but the task's patch_state is KLP_UNDEFINED")
    code.land(defined)
    code.asm(f"cmp r9d, {KLP_UNPATCHED}")
    code.jump("jne", settled)
    code.asm("mov r11, [r11]\n cmp r11, r10")
    code.jump("jne", settled)
    code.jump("jmp", unlock)

    code.land(empty)
    code.warn("klp_ftrace_handler found an empty func_stack")
    code.jump("jmp", unlock)

    append_recursion_retry(code, lock)
    code.warn("no recursion bit left in klp_ftrace_handler, the call is not redirected")
    code.asm("pop rbp\n ret").label("klp_ftrace_handler_end")
