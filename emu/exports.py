"""Kernel functions that guest code links against and the image does not define.

Those that need nothing but memory and CPU are guest code, assembled here (`append_guest_exports`): string
functions, return and retpoline thunks.  The others (`EXPORTS`) leave the guest through a stub and are
answered in Python; each says what it does here and what it leaves out.  A symbol that is in neither table is
refused when the module that wants it is loaded, except for what `CANNOT_RUN` names: there a call fails,
naming the caller.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from elf.errors import KlpemuError
from emu.assembly import Code
from emu.memory import read_string
from emu.traps import ARGUMENTS, Export
from emu.view import Layouts

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = ["CANNOT_RUN", "EXPORTS", "append_guest_exports"]

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
    for register in THUNK_REGISTERS:
        code.align(16).label(f"__x86_indirect_thunk_{register}").asm(f"jmp {register}")


def export(function: Callable[..., int | None]) -> Export:
    """Enter a function into EXPORTS; it gets the machine and as many integer arguments as it names."""
    count = function.__code__.co_argcount - 1

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
    allocate = machine.slab.kzalloc if flags & GFP_ZERO else machine.slab.kmalloc
    return allocate(size, f"__kmalloc by {machine.caller()}")


@export
def kmalloc_trace(machine: "Machine", _cache: int, flags: int, size: int) -> int:
    """As __kmalloc: there are no caches, and nothing is traced."""
    allocate = machine.slab.kzalloc if flags & GFP_ZERO else machine.slab.kmalloc
    return allocate(size, f"kmalloc by {machine.caller()}")


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
def fortify_panic(machine: "Machine", name: int) -> None:
    """FORTIFY_SOURCE found an overflow: the kernel panics, here the call ends with an error."""
    raise KlpemuError(
        f"detected buffer overflow in {read_string(machine.space, name)}", where=machine.caller()
    )


@export
def _printk(machine: "Machine", text: int) -> int:
    """Append the format string to the log as it is; conversions are not carried out."""
    line = read_string(machine.space, text)
    message = line[2:] if line.startswith("\x01") else line  # KERN_SOH and a level (printk_get_level())
    machine.log.pr_info(message.rstrip("\n"))
    return len(line)
