"""What two kernels must have in common, though their modules and trampolines lie elsewhere.

A snapshot becomes facts: a text for each thing that is compared.  Addresses become names, and displacements
of calls and jumps become the names of what they lead to; if a displacement leads nowhere that has a name, the
fact shows it.  The recorded snapshot and ours go through the same code.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from emu.assembly import disassemble
from emu.text_poke import CALL_OPCODE, INSN_SIZE, INT3, JMP32_OPCODE, NOP5
from klpemu.recording import Poke, Recording, Snapshot

__all__ = ["Names", "plain_line", "poke_fact", "snapshot_facts"]

_TRAMPOLINE: Final = "ftrace_trampoline [__builtin__ftrace]"
_ADDRESS: Final = re.compile(r"0x[0-9a-f]{16}\b")
_LENGTH: Final = re.compile(r"(\+0x[0-9a-f]+)/0x[0-9a-f]+")
_RIP: Final = re.compile(r"\[rip ([+-]) (0x[0-9a-f]+|\d+)\]")


@dataclass(frozen=True)
class Names:
    """What addresses are called.

    `exact`: both kernels are the same build, so that addresses, sizes and the whole of a function's first
    bytes are compared.
    """

    at: Mapping[int, str]
    exact: bool

    def name(self, address: int) -> str:
        """The name of an address, or the address."""
        return self.at.get(address & 0xFFFF_FFFF_FFFF_FFFF, f"{address & 0xFFFF_FFFF_FFFF_FFFF:#x}")

    @classmethod
    def recorded(cls, recording: Recording, *, exact: bool) -> "Names":
        """The names that a recording gives: its symbols, its watched functions, its trampolines."""
        at: dict[int, str] = {}
        for each in recording.sequence:
            if isinstance(each, Snapshot):
                at |= _targets(each)
        return cls(at | {address: name for name, address in recording.symbols.items()}, exact)

    def with_targets(self, snapshot: Snapshot) -> "Names":
        """Also those that one snapshot gives."""
        return Names({**self.at, **_targets(snapshot)}, self.exact)


def _targets(snapshot: Snapshot) -> dict[int, str]:
    at = {}
    for name, site in snapshot.sites.items():
        module = site.get("module")
        at[int(site["addr"], 16)] = f"{name} [{module}]" if module else name
        for key in ("target", "call_target"):
            if key in site and f"{key}_sym" in site:
                at[int(site[key], 16)] = str(site[f"{key}_sym"])
    return at


def snapshot_facts(snapshot: Snapshot, names: Names) -> dict[str, str]:
    """What is compared of a snapshot; in `names` its own targets need not be."""
    names = names.with_targets(snapshot)
    facts: dict[str, str] = {}
    for name, site in snapshot.sites.items():
        facts |= {f"{name} {what}": text for what, text in _site_facts(site, names)}
    trampolines = {
        int(site["target"], 16): f"<target of {name}>"
        for name, site in snapshot.sites.items()
        if "target" in site
    }
    for number, line in enumerate(snapshot.enabled_functions):
        facts[f"enabled_functions {number + 1}"] = _enabled_line(line, trampolines, exact=names.exact)
    facts["enabled_functions"] = f"{len(snapshot.enabled_functions)} lines"
    for patch, values in snapshot.livepatch.items():
        facts |= {f"/sys/kernel/livepatch/{patch}/{file}": value for file, value in values.items()}
    facts["/sys/kernel/livepatch"] = " ".join(sorted(snapshot.livepatch)) or "(empty)"
    if snapshot.modules is not None:
        for number, line in enumerate(snapshot.modules.splitlines()):
            facts[f"/proc/modules {number + 1}"] = _ADDRESS.sub("<address>", line)
        facts["/proc/modules"] = f"{len(snapshot.modules.splitlines())} lines"
    return facts


def _site_facts(site: Mapping[str, Any], names: Names) -> list[tuple[str, str]]:
    address = int(site["addr"], 16)
    code = bytes.fromhex(site["bytes16"])
    facts = [("site", _insn(address, code[:INSN_SIZE], names))]
    if names.exact and not site.get("module"):
        facts += [("address", site["addr"]), ("bytes behind the site", code[INSN_SIZE:].hex())]
    plain = ("kind", "target_sym", "per_ops_trampoline", "tramp_page_rest_zero")
    facts += [(key, str(site[key])) for key in plain if key in site]
    if "tramp_bytes" in site:
        start = int(site["target"], 16)
        facts.append(("trampoline", _rebased(start, bytes.fromhex(site["tramp_bytes"]), site, names)))
    offsets = ("ops_load_insn_off", "ops_ptr_off", "tramp_len", "call_off", "call_target_sym")
    facts += [(key, str(site[key])) for key in offsets if key in site]
    if "fops" in site:
        facts.append(("ops", f"func {site['fops']['func']}, flags {int(site['fops']['flags'], 16):#x}"))
    for number, func in enumerate(site.get("func_stack", ())):
        facts.append((f"func_stack {number + 1}", _func_fact(func, names)))
    facts.append(("func_stack", f"{len(site.get('func_stack', ()))} funcs"))
    return facts


def _func_fact(func: Mapping[str, Any], names: Names) -> str:
    old = names.name(int(func["old_func"], 16))
    where = "" if old == func["old_name"] else f" (old_func is {old})"
    flags = ", ".join(f"{key} {int(func[key])}" for key in ("nop", "patched", "transition"))
    return f"{func['old_name']}{where} -> {func['new_sym']}: {flags}"


def _insn(address: int, code: bytes, names: Names) -> str:
    """Five bytes of a site, in whatever phase of a change: the displacement becomes a name."""
    if code[0] not in (CALL_OPCODE, JMP32_OPCODE, INT3) or code[1:] == NOP5[1:]:
        return code.hex(" ")
    target = address + INSN_SIZE + int.from_bytes(code[1:], "little", signed=True)
    return f"{code[0]:02x} -> {names.name(target)}"


def _rebased(start: int, code: bytes, site: Mapping[str, Any], names: Names) -> str:
    """The code of a trampoline; where it leads out of itself, a name stands for the displacement."""
    end = start + max(len(code), int(site.get("tramp_len", len(code))))
    text, at = "", 0
    for each in disassemble(code, start):
        to = _leads_to(each.address, each.code, each.operands)
        at = each.address - start + len(each.code)
        if to is None or start <= to < end:
            text += each.code.hex()
        else:
            text += f"{each.code[:-4].hex()}<{names.name(to)}>"
    return text + code[at:].hex()


def _leads_to(address: int, code: bytes, operands: str) -> int | None:
    """Where a displacement at the end of an instruction leads (SDM Vol. 2A, 2.2.1.6, CALL, JMP, Jcc)."""
    near = (code[0] in (CALL_OPCODE, JMP32_OPCODE) and len(code) == 5) or (
        code[0] == 0x0F and code[1] & 0xF0 == 0x80 and len(code) == 6
    )
    rip = _RIP.search(operands)
    if not near and rip is None:
        return None
    end = address + len(code)
    if rip is not None:
        displacement = int(rip[2], 0) * (-1 if rip[1] == "-" else 1)
        # With an immediate behind it the displacement is not at the end: such bytes stay as they are.
        stored = (displacement & 0xFFFF_FFFF).to_bytes(4, "little")
        return end + displacement if code.endswith(stored) else None
    return end + int.from_bytes(code[-4:], "little", signed=True)


def _enabled_line(line: str, trampolines: Mapping[int, str], *, exact: bool) -> str:
    line = _ADDRESS.sub(lambda found: trampolines.get(int(found[0], 16), found[0]), line)
    return line if exact else _LENGTH.sub(r"\1", line)


def poke_fact(poke: Poke, names: Names) -> str:
    """One change of a site's bytes."""
    before, after = (_insn(poke.address, code, names) for code in (poke.before, poke.after))
    before, after = (text.replace(_TRAMPOLINE, "ftrace_trampoline") for text in (before, after))
    return f"{poke.step} {poke.site} phase {poke.phase}: {before} becomes {after}"


def plain_line(line: str) -> str:
    """A log line without addresses."""
    return _ADDRESS.sub("<address>", line)
