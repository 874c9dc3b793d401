"""ftrace's entry code: what arch/x86/kernel/ftrace_64.S is in a kernel, assembled for the layouts of our
image.

`ftrace_caller` and `ftrace_regs_caller` come out with the kernel's own bytes (a test compares them with what
was recorded from a real one), because private trampolines are copies of them and the offsets inside are an
interface.  Both keep their registers in a `struct pt_regs` on the stack; what they keep is exactly what the
macros save_mcount_regs and restore_mcount_regs keep: rax, rcx, rdx, rsi, rdi, r8, r9 and rbp.  The regs
variant keeps the flags and the rest, too, but for r11.

`arch_ftrace_ops_list_func` walks `ftrace_ops_list` and calls each ops whose hashes match, all of it guest
code over guest data (kernel/trace/ftrace.c, __ftrace_ops_list_func() and ftrace_ops_test()).
"""

from dataclasses import dataclass

from emu.assembly import Code
from emu.view import Layouts

__all__ = [
    "FTRACE_OPS_FL_STUB",
    "RECURSION_BITS",
    "TRACE_COUNT",
    "append_entry_code",
    "append_list_func",
    "append_recursion_retry",
    "append_recursion_trylock",
    "append_trace_count",
    "recursion_unlock",
]

FTRACE_OPS_FL_STUB = 1 << 5
TRACE_COUNT = "klpemu_trace_count"
KERNEL_CS = 0x10  # arch/x86/include/asm/segment.h
KERNEL_DS = 0x18
RETURN_ADDRESS = 8
GOLDEN_RATIO_64 = 0x61C8_8646_80B5_83EB  # include/linux/hash.h

# include/linux/trace_recursion.h: the normal-context and the transition bit of each user's group of five
RECURSION_BITS = {"TRACE_FTRACE_START": (3, 4), "TRACE_LIST_START": (8, 9)}

RIP_RELATIVE_LOAD_RDX = bytes.fromhex("488b15")  # movq disp32(%rip), %rdx


def append_entry_code(code: Code, layouts: Layouts, fixups: dict[int, str]) -> None:
    """Append __fentry__, ftrace_stub, ftrace_caller and ftrace_regs_caller.

    `fixups` receives the offset of each 32-bit PC-relative field and the symbol it refers to.
    """
    code.align(16).label("ftrace_stub").asm("ret").align(16).label("__fentry__").asm("ret")
    frame = _Frame(layouts)
    code.align(16).label("ftrace_caller")
    code.asm(frame.save(added=0))
    code.asm(f"lea rcx, [rsp + {frame.size + 8}]\n mov [rsp + {frame['sp']}], rcx")
    _load_ops(code, "ftrace_caller_op_ptr", fixups)
    code.asm(f"lea rcx, [rsp]\n mov qword ptr [rsp + {frame['cs']}], 0")
    _call_stub(code, "ftrace_call", fixups)
    code.asm(f"mov rax, [rsp + {frame['ip']}]\n mov [rsp + {frame.size}], rax")
    code.asm(frame.restore(saved=0))
    code.label("ftrace_caller_end").asm("ret")

    code.align(16).label("ftrace_regs_caller").asm("pushfq")
    code.asm(frame.save(added=8))
    _load_ops(code, "ftrace_regs_caller_op_ptr", fixups)
    rest = ("r15", "r14", "r13", "r12", "r11", "r10", "bx")
    code.asm("\n".join(f"mov [rsp + {frame[name]}], {_register(name)}" for name in rest))
    code.asm(f"mov rcx, [rsp + {frame.size}]\n mov [rsp + {frame['flags']}], rcx")
    code.asm(f"mov rcx, {KERNEL_DS}\n mov [rsp + {frame['ss']}], rcx")
    code.asm(f"mov rcx, {KERNEL_CS}\n mov [rsp + {frame['cs']}], rcx")
    code.asm(f"lea rcx, [rsp + {frame.size + 16}]\n mov [rsp + {frame['sp']}], rcx\n lea rcx, [rsp]")
    _call_stub(code, "ftrace_regs_call", fixups)
    code.asm(f"mov rax, [rsp + {frame['flags']}]\n mov [rsp + {frame.size}], rax")
    code.asm(f"mov rax, [rsp + {frame['ip']}]\n mov [rsp + {frame.size + 8}], rax")
    kept = ("r15", "r14", "r13", "r12", "r10", "bx")  # not r11: this is where it is lost
    code.asm("\n".join(f"mov {_register(name)}, [rsp + {frame[name]}]" for name in kept))
    code.asm(f"mov rax, [rsp + {frame['orig_ax']}]\n mov [rsp + {frame.size - 8}], rax\n test rax, rax")
    code.label("ftrace_regs_caller_jmp").raw("75 00")
    code.asm(frame.restore(saved=0)).asm("popfq")
    code.label("ftrace_regs_caller_end").asm("ret")
    # A direct caller left its target in ORIG_RAX: swap it with the flags and return there.
    jump = code.labels["ftrace_regs_caller_jmp"]
    code.bytes[jump + 1] = len(code.bytes) - (jump + 2)
    code.asm(
        f"mov rdi, [rsp + {frame.size}]\n mov [rsp + {frame.size - 8}], rdi\n mov [rsp + {frame.size}], rax"
    )
    code.asm(frame.restore(saved=8)).asm("popfq\n ret")


@dataclass(frozen=True, slots=True)
class RecursionLock:
    """Places of a trylock in the code: the jump taken if the bit is in use, and where a bit is set."""

    group: str
    busy: int
    set: int


def append_recursion_trylock(
    code: Code, layouts: Layouts, group: str, percpu: dict[str, int]
) -> RecursionLock:
    """Append ftrace_test_recursion_trylock(): current in rax, the mask of the bit in r8; uses r9.

    Interrupts are not modelled, so the context is always the normal one.
    """
    recursion = layouts.offsetof("task_struct", "trace_recursion")
    code.asm(f"""
        mov rax, qword ptr gs:[{percpu["current_task"]}]
        mov r9, [rax + {recursion}]
        mov r8d, {1 << RECURSION_BITS[group][0]}
        test r9d, r8d
    """)
    busy = code.jump("jnz")
    lock = RecursionLock(group, busy, len(code.bytes))
    code.asm(f"or r9, r8\n mov [rax + {recursion}], r9\n {_gs_dword('inc', percpu['__preempt_count'])}")
    return lock


def append_recursion_retry(code: Code, lock: RecursionLock) -> None:
    """Append where the busy jump goes: the transition bit is the one retry; falls through if it is in use."""
    code.land(lock.busy)
    code.asm(f"mov r8d, {1 << RECURSION_BITS[lock.group][1]}\n test r9d, r8d")
    code.jump("jz", lock.set)


def recursion_unlock(layouts: Layouts, percpu: dict[str, int], mask: str) -> str:
    """Assembly of ftrace_test_recursion_unlock(): current in rax, the bit's mask in a 64-bit register."""
    recursion = layouts.offsetof("task_struct", "trace_recursion")
    return f"""
        {_gs_dword("dec", percpu["__preempt_count"])}
        not {mask}
        and [rax + {recursion}], {mask}
    """


def append_list_func(code: Code, layouts: Layouts, percpu: dict[str, int], fixups: dict[int, str]) -> None:
    """Append arch_ftrace_ops_list_func(ip, parent_ip, ignored, fregs).

    rbx holds the ops, r12 ip, r13 parent_ip, r14 fregs, r15 the recursion bit; rbp is a frame pointer, so
    that the frame can be walked without tables.
    """
    ops = {name: layouts.offsetof("ftrace_ops", name) for name in ("func", "next", "flags", "func_hash")}
    hashes = {name: layouts.offsetof("ftrace_ops_hash", name) for name in ("filter_hash", "notrace_hash")}
    code.align(16).label("arch_ftrace_ops_list_func")
    code.asm("""
        push rbp
        mov rbp, rsp
        push rbx
        push r12
        push r13
        push r14
        push r15
        sub rsp, 8
        mov r12, rdi
        mov r13, rsi
        mov r14, rcx
    """)
    lock = append_recursion_trylock(code, layouts, "TRACE_LIST_START", percpu)
    code.asm("mov r15, r8")
    code.raw("488b1d 00000000")  # mov rbx, [rip + ftrace_ops_list]
    fixups[len(code.bytes) - 4] = "ftrace_ops_list"
    loop = len(code.bytes)
    code.asm(f"test dword ptr [rbx + {ops['flags']}], {FTRACE_OPS_FL_STUB}")
    skip_stub = code.jump("jnz")
    code.asm(f"mov rax, [rbx + {ops['func_hash']}]\n mov rdi, [rax + {hashes['filter_hash']}]")
    code.asm(_lookup(layouts))
    code.asm("cmp eax, 0")  # not in a filter hash that is not empty
    skip_filter = code.jump("jz")
    code.asm(f"mov rax, [rbx + {ops['func_hash']}]\n mov rdi, [rax + {hashes['notrace_hash']}]")
    code.asm(_lookup(layouts))
    code.asm("cmp eax, 1")  # in the notrace hash
    skip_notrace = code.jump("jz")
    code.asm(
        f"mov rdi, r12\n mov rsi, r13\n mov rdx, rbx\n mov rcx, r14\n call qword ptr [rbx + {ops['func']}]"
    )
    for jump in (skip_stub, skip_filter, skip_notrace):
        code.land(jump)
    code.asm(f"mov rbx, [rbx + {ops['next']}]\n test rbx, rbx")
    end = code.jump("jz")
    code.raw("488d05 00000000")  # lea rax, [rip + ftrace_list_end]
    fixups[len(code.bytes) - 4] = "ftrace_list_end"
    code.asm("cmp rbx, rax")
    code.jump("jnz", loop)
    code.land(end)
    code.asm(f"mov rax, qword ptr gs:[{percpu['current_task']}]\n {recursion_unlock(layouts, percpu, 'r15')}")
    out = len(code.bytes)
    code.asm("""
        add rsp, 8
        pop r15
        pop r14
        pop r13
        pop r12
        pop rbx
        pop rbp
        ret
    """)
    append_recursion_retry(code, lock)
    code.jump("jmp", out)
    code.label("arch_ftrace_ops_list_func_end")


def append_trace_count(code: Code, layouts: Layouts) -> None:
    """Append a tracer for images that bring none: it adds one to what `private` of its ops points to."""
    private = layouts.offsetof("ftrace_ops", "private")
    code.align(16).label(TRACE_COUNT).asm(f"mov rax, [rdx + {private}]\n inc qword ptr [rax]\n ret")


class _Frame:
    """Offsets into the `struct pt_regs` that the entry code builds on the stack."""

    def __init__(self, layouts: Layouts) -> None:
        self._layouts = layouts
        self.size = layouts.sizeof("pt_regs")

    def __getitem__(self, member: str) -> int:
        return self._layouts.offsetof("pt_regs", member)

    def save(self, added: int) -> str:
        """save_mcount_regs: the frame filled, ip in rdi, the parent's in rsi; `added` bytes lie below it."""
        saved = ("ax", "cx", "dx", "si", "di", "r8", "r9")
        stores = "\n".join(f"mov [rsp + {self[name]}], {_register(name)}" for name in saved)
        return f"""
            sub rsp, {self.size}
            {stores}
            mov qword ptr [rsp + {self["orig_ax"]}], 0
            mov rdx, rbp
            mov [rsp + {self["bp"]}], rdx
            mov rsi, [rsp + {self.size + RETURN_ADDRESS + added}]
            mov rdi, [rsp + {self.size + added}]
            mov [rsp + {self["ip"]}], rdi
            sub rdi, 5
        """

    def restore(self, saved: int) -> str:
        """restore_mcount_regs, leaving `saved` bytes of the frame on the stack."""
        restored = ("bp", "r9", "r8", "di", "si", "dx", "cx", "ax")
        loads = "\n".join(f"mov {_register(name)}, [rsp + {self[name]}]" for name in restored)
        return f"{loads}\n add rsp, {self.size - saved}"


def _gs_dword(operation: str, offset: int) -> str:
    """`inc` or `dec` of a 32-bit per-CPU variable; Keystone would make the address relative to RIP."""
    code = bytes((0x65, 0xFF, {"inc": 0x04, "dec": 0x0C}[operation], 0x25)) + offset.to_bytes(4, "little")
    return ".byte " + ", ".join(f"{byte:#x}" for byte in code)


def _register(member: str) -> str:
    return member if member[1:].isdigit() else f"r{member}"


def _load_ops(code: Code, label: str, fixups: dict[int, str]) -> None:
    code.label(label).raw(RIP_RELATIVE_LOAD_RDX).raw(bytes(4))
    fixups[len(code.bytes) - 4] = "function_trace_op"


def _call_stub(code: Code, label: str, fixups: dict[int, str]) -> None:
    code.label(label).raw("e8 00000000")
    fixups[len(code.bytes) - 4] = "ftrace_stub"


def _lookup(layouts: Layouts) -> str:
    """Look ip (r12) up in the ftrace_hash at rdi: eax 2 if the hash is NULL or empty, 1 if found, 0 if not.

    The bucket is hash_long(ip, size_bits), or the only one there is (ftrace_hash_key()).
    """
    count = layouts.offsetof("ftrace_hash", "count")
    bits = layouts.offsetof("ftrace_hash", "size_bits")
    buckets = layouts.offsetof("ftrace_hash", "buckets")
    ip = layouts.offsetof("ftrace_func_entry", "ip")
    return f"""
        mov eax, 2
        test rdi, rdi
        jz done
        cmp qword ptr [rdi + {count}], 0
        je done
        mov rcx, [rdi + {bits}]
        xor edx, edx
        test rcx, rcx
        jz bucket
        mov rdx, {GOLDEN_RATIO_64:#x}
        imul rdx, r12
        neg ecx
        shr rdx, cl
    bucket:
        mov rax, [rdi + {buckets}]
        mov rdx, [rax + rdx*8]
    walk:
        mov eax, 0
        test rdx, rdx
        jz done
        cmp [rdx + {ip}], r12
        je found
        mov rdx, [rdx]
        jmp walk
    found:
        mov eax, 1
    done:
    """
