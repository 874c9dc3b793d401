"""The instructions of a livepatch's functions, with names where they refer to something.

objdump, gdb and crash know nothing of klp relocations: where one will be written they show a call of the next
instruction, or the address 0.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from elf.klp_sections import KlpRelocation
from elf.relocation import R_X86_64_NONE, RULES, relocations
from elf.symbols import SHN_UNDEF
from emu.assembly import Instruction, disassemble
from emu.machine import Machine
from emu.module import LoadedObject
from klpemu.function_state import branch_target

__all__ = ["CodeLine", "ExplainedCode", "Reference"]


@dataclass(frozen=True, slots=True)
class Reference:
    """A klp relocation, resolved or not.

    `objname` is the object that its section waits for, `target` the index of the section that is relocated,
    `symbol` what its name says, as `object:name,sympos`.  `address` is the symbol's, with its place in
    `resolved`, or 0 if it is not resolved, and then `problem` says why; `is_due`: the object is there, so
    that it should be.
    """

    relocation: KlpRelocation
    objname: str
    target: int
    place: str
    symbol: str
    address: int
    resolved: str
    problem: str
    is_due: bool


@dataclass(frozen=True, slots=True)
class CodeLine:
    """An instruction: its offset in the function in bytes, itself, its text, and a comment, often empty."""

    offset: int
    instruction: Instruction
    text: str
    comment: str


@dataclass(frozen=True, slots=True)
class _Field:
    """A field that a relocation fills: the symbol's value, or its name if that has none."""

    value: int
    name: str
    addend: int
    type: int
    comment: str


class ExplainedCode:
    """The code of a livepatch module that is loaded.

    `missing` maps addresses to the symbols that this kernel lacks and that got these addresses instead.
    """

    def __init__(
        self,
        machine: Machine,
        loaded: LoadedObject,
        references: Iterable[Reference],
        missing: Mapping[int, str],
        *,
        att: bool,
    ) -> None:
        self._machine = machine
        self._loaded = loaded
        self._missing = missing
        self._att = att
        self._sites = set(loaded.sites)
        self._fields = self._ordinary_fields()
        for each in references:
            base = loaded.placement.addresses.get(each.target)
            if base is not None and each.relocation.type in RULES:
                self._fields[base + each.relocation.offset] = _klp_field(each)

    def lines(self, address: int) -> tuple[CodeLine, ...]:
        """The instructions of the function at a guest virtual address."""
        size = self._size_of(address)
        code = self._machine.space.read(address, size)
        return tuple(
            self._line(each, address, address + size) for each in disassemble(code, address, att=self._att)
        )

    def _line(self, instruction: Instruction, start: int, end: int) -> CodeLine:
        text, comments = str(instruction), []
        behind = instruction.address + len(instruction.code)
        target = branch_target(instruction)
        if instruction.address in self._sites:
            comments.append("fentry site")
        for at in range(instruction.address, behind):
            field = self._fields.get(at)
            if field is None or instruction.address in self._sites:
                continue
            name = self._name_of(field, behind - at if RULES[field.type].is_relative else 0)
            if target is not None:
                text = f"{instruction.mnemonic} {name}"
            elif name not in field.comment:
                comments.append(name)
            comments += [field.comment] if field.comment else []
            target = None
        if target is not None:
            inside = start <= target < end
            name = f"+{target - start:#x}" if inside else self._machine.kallsyms.describe(target)
            text = f"{instruction.mnemonic} {name}"
        return CodeLine(instruction.address - start, instruction, text, ", ".join(comments))

    def _name_of(self, field: _Field, distance: int) -> str:
        """What a field refers to; a relative one counts from `distance` bytes behind itself."""
        offset = field.addend + distance
        if field.name:
            return f"{field.name}{offset:+#x}" if offset else field.name
        return self._machine.kallsyms.describe(field.value + offset)

    def _ordinary_fields(self) -> dict[int, _Field]:
        placement, fields = self._loaded.placement, dict[int, _Field]()
        image = placement.image
        lacking = set(self._missing.values())
        for index, base in placement.addresses.items():
            for rela in image.relocation_sections(image.sections[index]):
                if rela.is_klp_relocation or not image.sections[index].is_exec:
                    continue
                for offset, kind, number, addend in relocations(image, rela):
                    if kind == R_X86_64_NONE or kind not in RULES:
                        continue
                    symbol = image.symbols[number]
                    name = symbol.name if symbol.section == SHN_UNDEF else ""
                    comment = "not in this kernel" if name in lacking else ""
                    fields[base + offset] = _Field(placement.value(symbol) or 0, name, addend, kind, comment)
        return fields

    def _size_of(self, address: int) -> int:
        """Bytes of the function; without the padding behind it if the symbol table has its size."""
        placement = self._loaded.placement
        for symbol in placement.image.symbols:
            if symbol.is_function and symbol.size and placement.value(symbol) == address:
                return symbol.size
        found = self._machine.kallsyms.lookup_size_offset(address)
        return found[0] - found[1] if found is not None else 0


def _klp_field(each: Reference) -> _Field:
    comment = f"klp {each.symbol}"
    if each.problem:
        comment += f", not resolved: {each.problem}"
    name = "" if each.address else each.symbol
    return _Field(each.address, name, each.relocation.addend, each.relocation.type, comment)
