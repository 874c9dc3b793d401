"""Klp relocations: what they make of a livepatch module's text, and whether they do what they were made for.

Addresses come from kallsyms, and formulas, field sizes and ranges from the psABI's table (elf/relocation.py).
What was written into which field, and with which symbol value, is the core's own record: after the symbol's
module has gone nothing else knows.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache

from elf.errors import ElfError, SymbolError
from elf.image import Image
from elf.klp_sections import KlpRelocation, klp_relocations, klp_sections, section_objname
from elf.relocation import RULES, Rule, type_name
from elf.section import Section
from emu.memory import read_string
from emu.module import LoadedObject, Text
from patches.invariants.finding import Finding, value_finding
from patches.invariants.subject import Subject
from patches.invariants.walk import entries
from patches.livepatch import VMLINUX

__all__ = ["expected_texts", "fields_for_modules", "klp_relocations_are_right"]

INVARIANT = "klp_relocations_are_right"


def expected_texts(loaded: LoadedObject) -> list[Text]:
    """The object's text and read-only data as loaded, with the klp relocations that were written since."""
    if not loaded.placement.klp.written:
        return loaded.texts
    fields: dict[int, bytes] = {}
    for rela, relocations in _klp_tables(loaded.placement.image):
        for number, each in enumerate(relocations):
            value = loaded.placement.klp.written.get((rela.index, number))
            if value is not None:
                location = loaded.placement.addresses[rela.info] + each.offset
                rule = RULES[each.type]
                total = _total(rule, value, each, location)
                fields[location] = (total % 2 ** (8 * rule.size)).to_bytes(rule.size, "little")
    return [_with_fields(text, fields) for text in loaded.texts]


def fields_for_modules(loaded: LoadedObject) -> dict[int, int]:
    """Address and size of each field that a klp relocation writes when some module comes.

    6.1 never clears them: what was written stays when the module goes, or when its coming fails
    (0c05e7bd2d01 ("livepatch,x86: Clear relocation targets on a module removal") (in v6.3)).
    """
    placement = loaded.placement
    return {
        placement.addresses[rela.info] + each.offset: RULES[each.type].size
        for rela, relocations in _klp_tables(placement.image)
        if section_objname(rela.name) != VMLINUX and rela.info in placement.addresses
        for each in relocations
        if each.type in RULES
    }


def klp_relocations_are_right(subject: Subject) -> Iterator[Finding | None]:
    """Each klp relocation whose object is there is written, with its symbol's address, and each that is
    written fits its field and lies in the section that it is for.

    Source: Documentation/livepatch/module-elf-format.rst; klp_apply_section_relocs().
    """
    objects = _objects(subject)
    for loaded in subject.livepatches:
        known = objects.get(loaded.name, {})
        for rela, relocations in _klp_tables(loaded.placement.image):
            target = loaded.placement.image.sections[rela.info]
            if target.index not in loaded.placement.addresses or target in loaded.placement.per_cpu:
                what = f"{rela.name} is never applied: {target.name} is not in the module's memory"
                yield Finding(INVARIANT, what)
                continue
            objname = section_objname(rela.name)
            if objname != VMLINUX and objname not in known:
                what = f"{rela.name} is never applied: the patch has no object '{objname}'"
                address = loaded.placement.addresses[target.index]
                yield Finding(INVARIANT, what, address, subject.place(address))
            is_there = objname == VMLINUX or known.get(objname, False)
            for number, each in enumerate(relocations):
                if each.type in RULES:
                    yield from _entry(subject, loaded, rela, number, each, is_there=is_there)


def _klp_tables(image: Image) -> Iterable[tuple[Section, Iterable[KlpRelocation]]]:
    """The klp relocation sections of a file with their entries; an error is raised where it is met."""
    known = _read(image)
    if known is not None:
        return known
    return ((rela, klp_relocations(image, rela)) for rela in klp_sections(image))


@lru_cache(maxsize=256)
def _read(image: Image) -> tuple[tuple[Section, tuple[KlpRelocation, ...]], ...] | None:
    """The same at once, as a file does not change; None if it has something wrong."""
    try:
        return tuple((rela, tuple(klp_relocations(image, rela))) for rela in klp_sections(image))
    except ElfError:
        return None


def _entry(
    subject: Subject, loaded: LoadedObject, rela: Section, number: int, each: KlpRelocation, *, is_there: bool
) -> Iterator[Finding | None]:
    """The checks of one relocation."""
    rule = RULES[each.type]
    location = loaded.placement.addresses[rela.info] + each.offset
    value = loaded.placement.klp.written.get((rela.index, number))
    target = loaded.placement.image.sections[rela.info]
    if is_there:
        wanted = _resolved(subject, each)
        if value is None:
            yield Finding(INVARIANT, f"{_what(each)} is not written", location, subject.place(location))
        elif value != wanted:
            what = f"{_what(each)} is written for another address"
            yield value_finding(INVARIANT, what, location, subject.place(location), wanted, value)
        else:
            yield None
    if value is None:
        return
    if each.offset + rule.size > target.size:
        outside = f"{_what(each)} lies outside of {target.name}, which has {target.size:#x} bytes"
        yield Finding(INVARIANT, outside, location, subject.place(location))
    else:
        yield None
    total = _total(rule, value, each, location)
    signed = total - 2**64 if rule.minimum < 0 and total >= 2**63 else total
    if not rule.minimum <= signed <= rule.maximum:
        what = f"{_what(each)} is cut off: {total:#x} does not fit its field"
        yield Finding(INVARIANT, what, location, subject.place(location))
    else:
        yield None


def _what(each: KlpRelocation) -> str:
    return f"{type_name(each.type)} against {each.symbol.name}"


def _resolved(subject: Subject, each: KlpRelocation) -> int:
    """What kallsyms says of the symbol now, 0 if nothing."""
    try:
        name = each.name
        module = "" if name.objname == VMLINUX else name.objname
        return subject.kallsyms.address_of(name.name, module, name.sympos)
    except (ElfError, SymbolError):
        return 0


def _total(rule: Rule, value: int, each: KlpRelocation, location: int) -> int:
    return (value + each.addend - (location if rule.is_relative else 0)) % 2**64


def _with_fields(text: Text, fields: Mapping[int, bytes]) -> Text:
    contents = bytearray(text.contents)
    for address, data in fields.items():
        start = address - text.address
        if 0 <= start < len(contents):
            contents[start : start + len(data)] = data
    return Text(text.name, text.address, bytes(contents))


def _objects(subject: Subject) -> dict[str, dict[str, bool]]:
    """By patch and object, whether the object is there, as the core's own structs have it."""
    found: dict[str, dict[str, bool]] = {}
    for address in entries(subject, subject.symbols["klp_patches"], "klp_patch", "list"):
        patch = subject.view("klp_patch", address)
        name = subject.view("module", patch.mod).name.split(b"\0")[0].decode("ascii", "backslashreplace")
        objects = found.setdefault(name, {})
        head = address + subject.layouts.offsetof("klp_patch", "obj_list")
        for at in entries(subject, head, "klp_object", "node"):
            obj = subject.view("klp_object", at)
            objects[read_string(subject.memory, obj.name) if obj.name else VMLINUX] = bool(obj.mod)
    return found
