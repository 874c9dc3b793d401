"""A redirected call, beside the same stream as plain code (`plain.py`), and beside a Python hook as handler.

The peer with the hook has the same sites and copies of the same trampolines, and for a handler one
instruction with a hook on it: Python that finds the func_stack in a dictionary and writes the top func's
address into the saved registers.  It has no transition to look at, and no recursion to guard against.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import unicorn
import unicorn.x86_const as x86

from bench.guest import driver, place, seconds_of
from bench.many import kernel_with_many, patch_of
from bench.measure import Result, Rounds, interleave
from bench.plain import PlainCode
from emu.cpu import VCpu
from emu.machine import Machine
from emu.stream import trace_call
from emu.text_poke import CALL_OPCODE, text_gen_insn
from klpemu.kernel import Kernel

__all__ = ["run"]

COUNTS = (1, 100, 10_000)
OPS = (1, 2, 5, 10, 50, 100)
CALLS = 20_000  # of a side in a round
HOOK_CALLS = 5_000
ROUNDS = 25
# QEMU's TLB starts with 256 entries and grows only when it is flushed, which a kernel does all the time.
TLB_GROWTHS = 10
OF_PLAIN_CODE, OF_HOOK = 1.2, 0.25
RET = b"\xc3"


def run() -> Iterator[Result]:
    """Ratios for 1, 100 and 10,000 functions called in turn, and instruction counts."""
    for count in COUNTS:
        yield from _compare(count)
    yield from _instructions()


def _compare(count: int) -> Iterator[Result]:
    kernel = kernel_with_many()
    kernel.enable(patch_of(count))
    rounds = _measure(kernel, count)
    of = f"{count:,} function{'s' if count > 1 else ''} in turn"
    result = functools.partial(Result, "redirect")
    yield result(f"redirected call, {of}", rounds.median("redirected") * 1e9, "ns")
    yield result(f"the same stream as plain code, {of}", rounds.median("plain") * 1e9, "ns")
    yield result(f"a Python hook as handler, {of}", rounds.median("hook") * 1e9, "ns")
    yield result(
        f"redirected / plain code, {of}", rounds.ratio("redirected", "plain"), "times", OF_PLAIN_CODE
    )
    yield result(f"redirected / Python hook, {of}", rounds.ratio("redirected", "hook"), "times", OF_HOOK)


def _measure(kernel: Kernel, count: int) -> Rounds:
    """Seconds per call of each side."""
    machine = kernel.machine
    functions = [kernel.address_of(f"many:fn_{number:05}") for number in range(count)]
    plain = PlainCode(machine)
    for function in functions:
        _, addresses = trace_call(machine, function, 1)
        plain.add(addresses, kernel.klp.ops_hints[function])
    targets = [kernel.address_of(f"fix_{count}:new_{number:05}") for number in range(count)]
    hooked, hook_cpu = _hooked(kernel, functions, targets)
    sides = {
        "redirected": (_new_cpu(machine), functions, CALLS),
        "plain": (_new_cpu(machine), plain.functions, CALLS),
        "hook": (hook_cpu, hooked, HOOK_CALLS),
    }
    bodies = {}
    for name, (cpu, entries, calls) in sides.items():
        times = max(1, calls // count)
        entry = driver(machine, entries, times)
        once = driver(machine, entries, 1)
        for _ in range(TLB_GROWTHS):
            seconds_of(machine, cpu, once)
            cpu.flush_tlb()
        bodies[name] = functools.partial(_per_call, machine, cpu, entry, times * count)
    interleave(bodies, 1)  # translates everything
    return interleave(bodies, ROUNDS)


def _per_call(machine: Machine, cpu: VCpu, entry: int, calls: int) -> float:
    return seconds_of(machine, cpu, entry) / calls


def _new_cpu(machine: Machine) -> VCpu:
    """A vCPU for one side: with translations and a TLB that nothing else has filled, shrunk or flushed."""
    return VCpu(machine.space, 0, machine.cpus[0].gs_base)


def _hooked(kernel: Kernel, functions: Sequence[int], targets: Sequence[int]) -> tuple[list[int], VCpu]:
    """Entries whose sites call a trampoline with a hook for its handler, and the vCPU that has this hook."""
    machine = kernel.machine
    stub = place(machine, len(RET), "bench stub")
    machine.space.write(stub, RET)
    sites_at = place(machine, 16 * len(targets), "bench sites")
    sites = [sites_at + 16 * number for number in range(len(targets))]
    func_stacks: dict[int, list[int]] = {}
    for site, function, target in zip(sites, functions, targets, strict=True):
        ops = machine.layouts.view("klp_ops", machine.space, kernel.klp.ops_hints[function]).fops
        trampoline = _copy_of_trampoline(machine, ops, stub)
        machine.space.write(site, text_gen_insn(CALL_OPCODE, site, trampoline) + RET)
        func_stacks[site] = [target]
    ip = machine.layouts.offsetof("pt_regs", "ip")
    write = machine.space.write

    def handler(uc: Any, _address: int, _size: int, _data: Any) -> None:
        func_stack = func_stacks[uc.reg_read(x86.UC_X86_REG_RDI)]
        write(uc.reg_read(x86.UC_X86_REG_RCX) + ip, func_stack[-1].to_bytes(8, "little"))

    cpu = _new_cpu(machine)
    cpu._uc.hook_add(unicorn.UC_HOOK_CODE, handler, begin=stub, end=stub)
    return sites, cpu


def _copy_of_trampoline(machine: Machine, ops: Any, stub: int) -> int:
    """A copy of the private trampoline of `ops` that calls `stub` as its handler."""
    code = machine.space.read(ops.trampoline, ops.trampoline_size)
    address = place(machine, len(code), "bench trampoline")
    call = machine.symbol("ftrace_call") - machine.symbol("ftrace_caller")
    machine.space.write(address, code)
    machine.space.write(address + call, text_gen_insn(CALL_OPCODE, address + call, stub))
    return address


def _instructions() -> Iterator[Result]:
    """Executed guest instructions of one redirected call, by the number of ops that want its site."""
    kernel = kernel_with_many()
    kernel.enable(patch_of(1))
    function = kernel.address_of("many:fn_00000")
    site, _ = kernel.site_of(function)
    present = 1
    for count in OPS:
        while present < count:
            kernel.machine.service("register", functools.partial(_add_ops, kernel.machine, site))
            present += 1
        executed = len(kernel.trace(function, 1).instructions)
        by = "private trampoline" if count == 1 else "list function"
        yield Result(
            "redirect", f"instructions of a redirected call, {count} ops ({by})", executed, "instructions"
        )


def _add_ops(machine: Machine, site: int) -> None:
    """Register one more ops on a site; its function counts."""
    ops = machine.view("ftrace_ops", machine.slab.kzalloc(machine.layouts.sizeof("ftrace_ops"), "bench ops"))
    ops.func = machine.symbol("trace_count")
    ops.private = machine.symbol("trace_counter")
    machine.ftrace.ftrace_set_filter_ip(ops, site, remove=False)
    machine.ftrace.register_ftrace_function(ops)
