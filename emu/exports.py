"""Kernel functions that guest code links against and the image does not define.

Those that need nothing but memory and CPU are guest code, assembled here (`append_guest_exports`): string
functions, return and retpoline thunks.  The others (`EXPORTS`) leave the guest through a stub and are
answered in Python; each says what it does here and what it leaves out.  A symbol that is in neither table is
refused when the module that wants it is loaded, except for what `CANNOT_RUN` names: there a call fails,
naming the caller.
"""

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING

from elf.errors import KlpemuError
from emu.assembly import Code
from emu.errno import KernelErrno
from emu.list import LIST_POISON1, LIST_POISON2
from emu.memory import read_string
from emu.traps import ARGUMENTS, Export
from emu.view import Layouts

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = ["CANNOT_RUN", "EXPORTS", "allocate", "append_guest_exports"]

# name: assembly.  All keep to the C ABI; none has an fentry site, as lib/string.c and arch/x86/lib have none.
GUEST_EXPORTS = {
    "__x86_return_thunk": "ret",
    "memcpy": "mov rax, rdi\n mov rcx, rdx\n rep movsb\n ret",
    "memset": "mov r9, rdi\n mov eax, esi\n mov rcx, rdx\n rep stosb\n mov rax, r9\n ret",
    "memmove": """
        mov rax, rdi
        mov rcx, rdx
        cmp rsi, rdi
        jae forward
        lea r8, [rsi + rdx]
        cmp r8, rdi
        jbe forward
        lea rsi, [rsi + rdx - 1]
        lea rdi, [rdi + rdx - 1]
        std
        rep movsb
        cld
        ret
    forward:
        rep movsb
        ret
    """,
    "memcmp": """
        mov rcx, rdx
        xor eax, eax
        test rcx, rcx
        jz same
    next:
        movzx eax, byte ptr [rdi]
        movzx edx, byte ptr [rsi]
        sub eax, edx
        jne same
        inc rdi
        inc rsi
        dec rcx
        jnz next
    same:
        ret
    """,
    "strlen": """
        xor eax, eax
    next:
        cmp byte ptr [rdi + rax], 0
        je end
        inc rax
        jmp next
    end:
        ret
    """,
}
# kernel/locking/spinlock.c: the vCPU is not taken away while a lock is held, and who does not get it spins.
# Interrupts and bottom halves, which the other forms switch off, are not modelled; nor is it in what order
# the waiters get a lock, or that whoever releases one may have to give the vCPU up.
SPIN_LOCK = """
    spin:
        xor eax, eax
        lock cmpxchg dword ptr [rdi], edx
        je locked
        pause
        jmp spin
    locked:
"""
SPIN_LOCKS = {
    "_raw_spin_lock": "ret",
    "_raw_spin_lock_irq": "ret",
    "_raw_spin_lock_bh": "ret",
    "_raw_spin_lock_irqsave": "pushfq\n pop rax\n ret",
}
SPIN_UNLOCKS = (
    "_raw_spin_unlock",
    "_raw_spin_unlock_irq",
    "_raw_spin_unlock_bh",
    "_raw_spin_unlock_irqrestore",
)
# Variables that modules read: size in bytes of so many zeroes.
GUEST_DATA = {"fips_enabled": 4, "kmalloc_caches": 1024}
THUNK_REGISTERS = (
    "rax",
    "rbx",
    "rcx",
    "rdx",
    "rsi",
    "rdi",
    "rbp",
    *(f"r{number}" for number in range(8, 16)),
)

# What a kernel has, and what means nothing without the crypto API behind it: only init and exit functions
# call these, so that a module that uses others' algorithms can still be loaded, patched and called.
CANNOT_RUN = (
    "crypto_register_alg",
    "crypto_register_algs",
    "crypto_register_shash",
    "crypto_unregister_alg",
    "crypto_unregister_algs",
    "crypto_unregister_shash",
)

GFP_ZERO = 0x100  # ___GFP_ZERO of include/linux/gfp_types.h

EXPORTS: dict[str, Export] = {}


def append_guest_exports(
    code: Code, layouts: Layouts, per_cpu: dict[str, int], fixups: dict[int, str]
) -> None:
    """Append the exports that are guest code.

    A retpoline thunk is a plain indirect jump, as the kernel makes it on a CPU that needs no retpolines.
    """
    for name, source in GUEST_EXPORTS.items():
        code.align(16).label(name).asm(source)
        if name.startswith("mem"):
            code.labels[f"__{name}"] = code.labels[name]
    for name, size in GUEST_DATA.items():
        code.align(16).label(name).raw(bytes(size))
    count = per_cpu["__preempt_count"].to_bytes(4, "little")
    for name, rest in SPIN_LOCKS.items():
        code.align(16).label(name).raw(b"\x65\xff\x04\x25" + count)  # inc dword ptr gs:[__preempt_count]
        code.asm(f"mov edx, 1\n{SPIN_LOCK}\n{rest}")
    for name in SPIN_UNLOCKS:
        code.align(16).label(name).asm("mov dword ptr [rdi], 0")
        code.raw(b"\x65\xff\x0c\x25" + count).asm("ret")  # dec dword ptr gs:[__preempt_count]
    for register in THUNK_REGISTERS:
        code.align(16).label(f"__x86_indirect_thunk_{register}").asm(f"jmp {register}")


def export(function: Callable[..., int | None]) -> Export:
    """Enter a function into EXPORTS; it gets the machine and as many integer arguments as it names."""
    count = function.__code__.co_argcount - 1

    @wraps(function)
    def answer(machine: "Machine", registers: dict[str, int]) -> int | None:
        return function(machine, *(registers[name] for name in ARGUMENTS[:count]))

    EXPORTS[function.__name__] = answer
    return answer


@export
def __stack_chk_fail(machine: "Machine") -> None:
    """A stack canary was overwritten: the kernel panics, here the call ends with an error."""
    raise KlpemuError("stack-protector: Kernel stack is corrupted", where=machine.caller())


@export
def __kmalloc(machine: "Machine", size: int, flags: int) -> int:
    """Allocate from the slab; the flags are ignored but for __GFP_ZERO."""
    return allocate(machine, size, flags, f"__kmalloc by {machine.caller()}")


@export
def kmalloc_trace(machine: "Machine", _cache: int, flags: int, size: int) -> int:
    """As __kmalloc: there are no caches, and nothing is traced."""
    return allocate(machine, size, flags, f"kmalloc by {machine.caller()}")


def allocate(machine: "Machine", size: int, flags: int, tag: str) -> int:
    """Memory from the heap, zeroed if the flags say so; 0 (NULL) if there is none."""
    try:
        return (machine.slab.kzalloc if flags & GFP_ZERO else machine.slab.kmalloc)(size, tag)
    except KernelErrno:
        return 0


@export
def kfree(machine: "Machine", address: int) -> None:
    """Free; a wrong or doubly freed pointer is an error."""
    machine.slab.kfree(address)


@export
def kfree_sensitive(machine: "Machine", address: int) -> None:
    """Clear and free."""
    if address:
        size, _ = machine.slab.live.get(address, (0, ""))
        machine.space.write(address, bytes(size))
        machine.slab.kfree(address)


@export
def __list_add_valid(machine: "Machine", new: int, prev: int, next_: int) -> int:
    """The list is whole where `new` is to come in (1); the kernel is BUG where not (lib/list_debug.c)."""
    before, after = (machine.view("list_head", each) for each in (prev, next_))
    if after.prev != prev or before.next != next_ or new in (prev, next_):
        raise KlpemuError(f"list_add corruption at {new:#x}", where=machine.caller())
    return 1


@export
def __list_del_entry_valid(machine: "Machine", entry: int) -> int:
    """The entry is on a list that is whole there (1); the kernel is BUG where not."""
    found = machine.view("list_head", entry)
    prev, next_ = found.prev, found.next
    poisoned = next_ == LIST_POISON1 or prev == LIST_POISON2
    if poisoned or any(
        other != entry
        for other in (machine.view("list_head", prev).next, machine.view("list_head", next_).prev)
    ):
        raise KlpemuError(f"list_del corruption at {entry:#x}", where=machine.caller())
    return 1


@export
def fortify_panic(machine: "Machine", name: int) -> None:
    """FORTIFY_SOURCE found an overflow: the kernel panics, here the call ends with an error."""
    raise KlpemuError(
        f"detected buffer overflow in {read_string(machine.space, name)}", where=machine.caller()
    )
