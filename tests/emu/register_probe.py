"""Guest code that fills every register, goes on for a while, and counts those that have changed."""

from machines import append_test_code, image

from emu.assembly import Code
from emu.machine import Machine
from emu.view import Layouts

GENERAL = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", *(f"r{number}" for number in range(8, 16)))
CALLEE_SAVED = ("rbx", "rbp", "r12", "r13", "r14", "r15")
VECTORS = tuple(f"xmm{number}" for number in range(16))

# The frame: rounds left, the seed, then what the registers held.
ROUNDS, SEED, SAVED = 0, 8, 16
FRAME = SAVED + 8 * (len(GENERAL) + 1) + 16 * len(VECTORS) + 8


def _value(name: str) -> int:
    return 0x5A5A_0000_0000_0000 + (GENERAL + VECTORS).index(name) * 0x0101_0101


def _append_probe(code: Code, name: str, kept: tuple[str, ...], fixups: dict[int, str], body: str) -> None:
    """`name(seed, rounds)`: how many of the `kept` registers, the vectors and CF changed in the body."""
    wide = VECTORS if body == "loop" else ()
    code.align(16).label(name)
    code.asm("\n".join(f"push {register}" for register in CALLEE_SAVED))
    code.asm(f"sub rsp, {FRAME}\n mov [rsp + {ROUNDS}], rsi\n mov [rsp + {SEED}], rdi")
    for register in wide:
        code.asm(f"movabs rax, {_value(register):#x}\n add rax, [rsp + {SEED}]\n movq {register}, rax")
        code.asm(f"pshufd {register}, {register}, 0x44")
    for register in kept:
        code.asm(f"movabs {register}, {_value(register):#x}\n add {register}, [rsp + {SEED}]")
    code.label(f"{name}_body")
    if body == "loop":
        # dec leaves CF alone.
        code.asm(f"stc\nagain:\n dec qword ptr [rsp + {ROUNDS}]\n jnz again")
    else:
        code.asm("stc").raw("e8 00000000")
        fixups[len(code.bytes) - 4] = body
    slots = {}
    for number, register in enumerate(kept):
        slots[register] = SAVED + 8 * number
        code.asm(f"mov [rsp + {slots[register]}], {register}")
    code.asm("mov eax, 0\n adc eax, 0\n xor eax, 1")  # 1 if CF is gone
    if body != "loop":
        code.asm("xor eax, eax")
    for number, register in enumerate(wide):
        slots[register] = SAVED + 8 * len(GENERAL) + 8 + 16 * number
        code.asm(f"movdqu [rsp + {slots[register]}], {register}")
    for register, slot in slots.items():
        code.asm(f"movabs rdx, {_value(register):#x}\n add rdx, [rsp + {SEED}]")
        for half in (0, 8) if register in wide else (0,):
            code.asm(f"xor ecx, ecx\n cmp rdx, [rsp + {slot + half}]\n setne cl\n add rax, rcx")
    code.asm(f"add rsp, {FRAME}")
    code.asm("\n".join(f"pop {register}" for register in reversed(CALLEE_SAVED)))
    code.asm("ret")


def append_probes(code: Code, layouts: Layouts, per_cpu: dict[str, int], fixups: dict[int, str]) -> None:
    """keep_registers(seed, rounds); keep_across_export(seed), which calls test_export; the stack canary."""
    _append_probe(code, "keep_registers", GENERAL, fixups, "loop")
    _append_probe(code, "keep_across_export", CALLEE_SAVED, fixups, "test_export")
    code.align(16).label("stack_canary").raw("65 48 8b 04 25 28000000 c3")  # mov rax, gs:[40]; ret


def boot_with_probes(*, cpus: int = 1) -> Machine:
    """A fresh machine with the fixture kernel and the probes."""
    code = (append_test_code, append_probes)
    return Machine(image("kernel.o"), entry_code=code, stubs=("test_export",), cpus=cpus)
