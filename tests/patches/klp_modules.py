"""The fixture livepatch with klp relocations, and copies of it with something changed."""

from pathlib import Path
from struct import pack_into, unpack_from
from typing import Self

from elf.image import Image
from elf.klp_sections import klp_relocations, klp_sections
from elf.relocation import RULES
from elf.section import Section
from klpemu import Kernel

BUILD = Path(__file__).resolve().parents[2] / "fixtures" / "build"
LAMP = BUILD / "lamp.ko"
KLP_LAMP = BUILD / "klp_lamp.ko"
KPATCH_LAMP = BUILD / "klp_lamp_kpatch.ko"

VMLINUX_TEXT = ".klp.rela.vmlinux..text.livepatch_call_same_two"
VMLINUX_DATA = ".klp.rela.vmlinux..data.same_names"
LAMP_TEXT = ".klp.rela.lamp..text.livepatch_lamp_light"
LAMP_DATA = ".klp.rela.lamp..data.level_at"
LAMP_32S = ".klp.rela.lamp..text.livepatch_lamp_flash"


def section_of(image: Image, name: str) -> Section:
    """The klp relocation section of that name."""
    return next(section for section in klp_sections(image) if section.name == name)


class Changed:
    """A copy of a module whose bytes are changed in place; names keep their length."""

    def __init__(self, path: Path = KLP_LAMP) -> None:
        self._name = path.name
        self._data = bytearray(path.read_bytes())
        self.image = Image.open(path)

    def symbol_name(self, old: str, new: str) -> Self:
        """Rename a livepatch symbol."""
        return self._string(old, new)

    def section_name(self, old: str, new: str) -> Self:
        """Rename a section."""
        return self._string(old, new)

    def symbol_section(self, name: str, index: int) -> Self:
        """Give a symbol another st_shndx."""
        symbol = next(each for each in self.image.symbols if each.name == name)
        table = next(each for each in self.image.sections if each.name == ".symtab")
        pack_into("<H", self._data, table.offset + 24 * symbol.index + 6, index)
        return self

    def flags(self, name: str, flags: int) -> Self:
        """Give a section other sh_flags."""
        pack_into("<Q", self._data, self._header(name) + 8, flags)
        return self

    def header(self, name: str, offset: int, data: bytes) -> Self:
        """Change bytes of a section's header."""
        at = self._header(name) + offset
        self._data[at : at + len(data)] = data
        return self

    def target(self, name: str, target: str) -> Self:
        """Have a relocation section apply to another section (sh_info)."""
        index = next(each.index for each in self.image.sections if each.name == target)
        pack_into("<I", self._data, self._header(name) + 44, index)
        return self

    def entry(
        self,
        section: str,
        number: int,
        *,
        offset: int | None = None,
        type: int | None = None,
        addend: int | None = None,
    ) -> Self:
        """Change one klp relocation."""
        rela = section_of(self.image, section)
        each = list(klp_relocations(self.image, rela))[number]
        pack_into(
            "<QQq",
            self._data,
            rela.offset + 24 * number,
            each.offset if offset is None else offset,
            each.symbol.index << 32 | (each.type if type is None else type),
            each.addend if addend is None else addend,
        )
        return self

    def contents(self, section: str, offset: int, data: bytes) -> Self:
        """Change bytes of a section."""
        found = next(each for each in self.image.sections if each.name == section)
        at = found.offset + offset
        self._data[at : at + len(data)] = data
        return self

    def saved(self, folder: Path) -> Path:
        """The changed module as a file."""
        path = folder / self._name
        path.write_bytes(self._data)
        return path

    def _header(self, name: str) -> int:
        index = next(each.index for each in self.image.sections if each.name == name)
        (table,) = unpack_from("<Q", self._data, 40)
        return int(table) + 64 * index

    def _string(self, old: str, new: str) -> Self:
        before, after = old.encode() + b"\0", new.encode() + b"\0"
        assert len(before) == len(after)
        assert self._data.count(before) == 1
        start = self._data.index(before)
        self._data[start : start + len(before)] = after
        return self


def fields(kernel: Kernel, section: str, module: str = "klp_lamp") -> list[bytes]:
    """The bytes that a klp relocation section's entries stand for, as guest memory has them."""
    placement = kernel.machine.modules.objects[module].placement
    rela = section_of(placement.image, section)
    base = placement.addresses[rela.info]
    return [
        kernel.machine.space.read(base + each.offset, RULES[each.type].size if each.type else 8)
        for each in klp_relocations(placement.image, rela)
    ]


def are_zero(values: list[bytes]) -> bool:
    return not any(any(value) for value in values)


def trace_of(kernel: Kernel) -> dict[str, object]:
    """What a module that is refused could leave behind."""
    machine = kernel.machine
    return {
        "modules": list(machine.modules.objects),
        "slab": dict(machine.slab.live),
        "area": dict(machine.area.live),
        "symbols": list(machine.kallsyms.modules()),
        "records": {record.ip: record.flags for record in machine.ftrace.records},
        "list": machine.space.read(machine.vmlinux.symbols["modules"], 16),
        "enabled": [each.patch.name for each in kernel.enabled],
    }
