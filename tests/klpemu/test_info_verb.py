"""`klpemu info`: what it says of a livepatch module, and that it is true."""

from pathlib import Path
from struct import pack_into, unpack_from
from typing import Any

import pytest
from command_line import klpemu

from elf.errors import KlpemuError
from elf.image import Image
from klpemu import Kernel
from klpemu.fixtures import fixture
from klpemu.info import PatchInfo, patch_info
from klpemu.info_code import CodeLine

LAMP, KLP_LAMP, KPATCH_LAMP = "builtin:lamp.ko", "builtin:klp_lamp.ko", "builtin:klp_lamp_kpatch.ko"
NOT_LOADED = "module lamp is not loaded"

both = pytest.mark.parametrize("path", [KLP_LAMP, KPATCH_LAMP])


@pytest.fixture
def kernel() -> Kernel:
    """The built-in kernel with lamp."""
    kernel = Kernel.load()
    kernel.load_module(LAMP)
    return kernel


def changed(folder: Path, *edits: tuple[str, int, bytes]) -> Path:
    """A copy of klp_lamp.ko with other bytes; an edit is a section, an offset in it, and the bytes there."""
    source = fixture("klp_lamp.ko")
    contents = bytearray(source.read_bytes())
    for section, offset, data in edits:
        found = next(each for each in Image.open(source).sections if each.name == section)
        contents[found.offset + offset : found.offset + offset + len(data)] = data
    path = folder / "klp_lamp.ko"
    path.write_bytes(contents)
    return path


def renamed(folder: Path, old: str, new: str) -> Path:
    """A copy of klp_lamp.ko with another name of the same length, or a shorter one, in it."""
    source = fixture("klp_lamp.ko").read_bytes()
    assert old.encode() + b"\0" in source
    path = folder / "klp_lamp.ko"
    path.write_bytes(source.replace(old.encode() + b"\0", new.encode().ljust(len(old) + 1, b"\0")))
    return path


def code_of(info: PatchInfo, old: str) -> dict[int, CodeLine]:
    """The instructions that replace a function, by offset."""
    func = next(func for obj in info.objects for func in obj.functions if func.old == old)
    return {line.offset: line for line in func.code}


def problems(info: PatchInfo) -> dict[str, str]:
    """Why klp relocations are not resolved, by symbol."""
    return {each.symbol: each.problem for some in info.references.values() for each in some if each.problem}


# What it finds out.


@both
def test_it_knows_what_the_module_declares(kernel: Kernel, path: str) -> None:
    name = path.removeprefix("builtin:").removesuffix(".ko")
    info = patch_info(kernel, path)
    assert (info.name, info.declared, info.replace, info.states) == (name, True, False, ((7, 2),))
    assert (info.missing, info.problems, info.holds) == ((), (), True)
    vmlinux, lamp = info.objects
    assert (vmlinux.name, vmlinux.loaded, vmlinux.callbacks) == ("vmlinux", True, {})
    assert (lamp.name, lamp.loaded) == ("lamp", True)
    assert lamp.callbacks == {
        "pre_patch": f"pre_patch+0x0/0x10 [{name}]",
        "post_unpatch": f"post_unpatch+0x0/0x1a [{name}]",
    }
    assert [(func.old, func.sympos, func.place) for obj in info.objects for func in obj.functions] == [
        ("call_same_one", 0, "call_same_one+0x0/0x20"),
        ("call_same_two", 1, "call_same_two+0x0/0x20"),
        ("lamp_light", 0, "lamp_light+0x0/0x20 [lamp]"),
        ("lamp_flash", 0, "lamp_flash+0x0/0xf [lamp]"),
    ]
    assert all(func.site == func.place for obj in info.objects for func in obj.functions)


@both
def test_each_klp_relocation_is_resolved_by_position(kernel: Kernel, path: str) -> None:
    info = patch_info(kernel, path)
    found = {each.symbol: each.address for some in info.references.values() for each in some}
    assert found == {
        "vmlinux:same_name,1": kernel.address_of("same_name,1"),
        "vmlinux:same_name,2": kernel.address_of("same_name,2"),
        "vmlinux:twin,2": kernel.address_of("twin,2"),
        "vmlinux:div_errors,0": kernel.address_of("div_errors"),
        "lamp:glow,2": kernel.address_of("lamp:glow,2"),
        "lamp:level,0": kernel.address_of("lamp:level"),
    }


def test_the_disassembly_has_names_for_both_kinds_of_relocation(kernel: Kernel) -> None:
    info = patch_info(kernel, KLP_LAMP)
    code = code_of(info, "lamp_light")
    assert (code[0].text, code[0].comment) == ("nop dword ptr [rax + rax]", "fentry site")
    assert (code[0x9].text, code[0x9].comment) == ("call glow+0x0/0x10 [lamp]", "klp lamp:glow,2")
    assert code[0x11].comment == "level_at+0x0/0x8 [klp_lamp]"
    assert code[0x1B].comment == "level+0x0/0x8 [lamp], klp lamp:level,0"
    assert code[0x2C].text == "ret"
    assert max(code) == 0x2C  # and not the padding behind it
    (address,) = (line for line in code_of(info, "lamp_flash").values() if "level" in line.comment)
    assert address.comment == "level+0x0/0x8 [lamp], klp lamp:level,0"


def test_the_bytes_shown_are_those_that_an_enabled_patch_has(kernel: Kernel) -> None:
    info = patch_info(kernel, KLP_LAMP)
    enabled = Kernel.load()
    enabled.load_module(LAMP)
    enabled.insmod(KLP_LAMP)
    for obj in info.objects:
        for func in obj.functions:
            shown = b"".join(line.instruction.code for line in func.code)
            address = enabled.address_of(f"klp_lamp:{func.new.partition('+')[0]}")
            assert shown == enabled.machine.space.read(address, len(shown))


def test_jumps_inside_of_a_function_lead_to_offsets(kernel: Kernel, tmp_path: Path) -> None:
    path = changed(tmp_path, (".text.livepatch_lamp_light", 5, b"\xeb\x02\x90\x90"))
    assert code_of(patch_info(kernel, path), "lamp_light")[5].text == "jmp +0x9"


def test_the_padding_behind_a_function_is_no_part_of_it(kernel: Kernel) -> None:
    code = code_of(patch_info(kernel, "builtin:klp_area.ko"), "area_of")
    assert list(code) == [0, 5, 8, 0xC]
    assert code[0xC].text == "ret"


def test_what_is_for_a_module_that_is_not_there_is_named_from_the_file() -> None:
    info = patch_info(Kernel.load(), KLP_LAMP)
    assert info.holds
    assert problems(info) == {"lamp:glow,2": NOT_LOADED, "lamp:level,0": NOT_LOADED}
    lamp = info.objects[1]
    assert not lamp.loaded
    assert [(func.place, func.site, func.problem) for func in lamp.functions] == [("", "", "")] * 2
    code = code_of(info, "lamp_light")
    assert code[0x9].text == "call lamp:glow,2"
    assert code[0x9].comment == f"klp lamp:glow,2, not resolved: {NOT_LOADED}"
    assert code[0x1B].comment == f"klp lamp:level,0, not resolved: {NOT_LOADED}"


def test_afterwards_the_kernel_is_as_before(kernel: Kernel) -> None:
    machine = kernel.machine
    hooks = (machine.modules.missing, machine.modules.klp_apply_relocations, dict(machine.traps.exports))
    before = (list(machine.modules.objects), dict(machine.area.live), list(kernel.enabled))
    patch_info(kernel, KLP_LAMP)
    assert (list(machine.modules.objects), dict(machine.area.live), list(kernel.enabled)) == before
    assert (
        machine.modules.missing,
        machine.modules.klp_apply_relocations,
        dict(machine.traps.exports),
    ) == hooks
    kernel.verify().raise_for_findings()
    kernel.insmod(KLP_LAMP)
    assert kernel.call("lamp:lamp_light", 1) == 2081
    kernel.verify().raise_for_findings()


# What keeps a kernel from taking it.


@pytest.mark.parametrize(
    ("old", "new", "symbol", "problem"),
    [
        (
            ".klp.sym.vmlinux.same_name,2",
            ".klp.sym.vmlinux.same_name,3",
            "vmlinux:same_name,3",
            "symbol position 3 for symbol 'same_name' in object 'vmlinux' not found",
        ),
        (
            ".klp.sym.vmlinux.same_name,2",
            ".klp.sym.vmlinux.same_name,0",
            "vmlinux:same_name,0",
            "unresolvable ambiguity for symbol 'same_name' in object '(null)'",
        ),
        (
            ".klp.sym.lamp.glow,2",
            ".klp.sym.vmlinux.x,0",
            "vmlinux:x,0",
            "invalid access to vmlinux symbol 'x' from module-specific livepatch relocation section",
        ),
        (
            ".klp.sym.lamp.glow,2",
            ".klp.sym.lamp.glow;2",
            ".klp.sym.lamp.glow;2",
            "symbol .klp.sym.lamp.glow;2 has an incorrectly formatted name",
        ),
    ],
)
def test_a_klp_relocation_that_cannot_be_resolved_says_why_in_the_kernel_s_words(
    kernel: Kernel, tmp_path: Path, old: str, new: str, symbol: str, problem: str
) -> None:
    info = patch_info(kernel, renamed(tmp_path, old, new))
    assert problems(info) == {symbol: problem}
    assert info.problems == ()  # said once
    assert not info.holds
    assert info.declared


def test_the_disassembly_names_what_cannot_be_resolved(kernel: Kernel, tmp_path: Path) -> None:
    path = renamed(tmp_path, ".klp.sym.vmlinux.twin,2", ".klp.sym.vmlinux.twim,2")
    line = code_of(patch_info(kernel, path), "call_same_two")[0xE]
    assert line.comment == "klp vmlinux:twim,2, not resolved: symbol 'twim' not found in symbol table"


def test_a_section_that_names_no_object_is_a_problem(kernel: Kernel, tmp_path: Path) -> None:
    old, new = (f".klp.rela.{name}..text.livepatch_lamp_light" for name in ("lamp", ".amp"))
    info = patch_info(kernel, renamed(tmp_path, old, new))
    assert info.problems == (f"section {new} has an incorrectly formatted name",)
    assert not info.holds


def test_a_klp_section_that_leads_out_of_the_module_is_a_problem(kernel: Kernel, tmp_path: Path) -> None:
    path = changed(tmp_path)
    data = bytearray(path.read_bytes())
    sections = {each.name: each.index for each in Image.open(path).sections}
    (table,) = unpack_from("<Q", data, 40)
    header = table + 64 * sections[".klp.rela.lamp..data.level_at"]
    pack_into("<I", data, header + 44, sections[".comment"])  # sh_info
    path.write_bytes(data)
    info = patch_info(kernel, path)
    assert info.problems == (
        "it or the section it applies to is not loaded: the kernel would use freed memory",
    )
    assert info.declared
    assert not info.holds


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("no_such_name", "symbol 'no_such_name' not found in symbol table"),
        ("same_name", "unresolvable ambiguity for symbol 'same_name' in object '(null)'"),
        ("notrace_add", "it has no fentry site; patch its callers instead"),
    ],
)
def test_a_function_that_cannot_be_patched_says_why(
    kernel: Kernel, tmp_path: Path, name: str, problem: str
) -> None:
    source = Image.open(fixture("klp_lamp.ko"))
    strings = next(each for each in source.sections if each.name == ".rodata.str1.1")
    offset = bytes(source.contents(strings)).index(b"call_same_one\0")
    info = patch_info(kernel, changed(tmp_path, (".rodata.str1.1", offset, name.encode().ljust(14, b"\0"))))
    assert info.objects[0].functions[0].problem == problem
    assert not info.holds


def test_a_symbol_that_the_kernel_lacks_is_named(kernel: Kernel, tmp_path: Path) -> None:
    path = renamed(tmp_path, "klp_enable_patch", "klp_enable_pitch")
    info = patch_info(kernel, path)
    assert info.missing == ("klp_enable_pitch",)
    assert not info.declared
    assert "jump to unmapped address" in info.problems[0]
    assert problems(info) == {}  # which needs nothing of it
    assert not info.holds


def test_a_call_of_what_the_kernel_lacks_is_named_in_the_disassembly(tmp_path: Path) -> None:
    """A klp relocation and its symbol are made ordinary ones, which no kernel can resolve."""
    name = ".klp.sym.lamp.glow,2"
    index = next(each.index for each in Image.open(fixture("klp_lamp.ko")).symbols if each.name == name)
    path = changed(
        tmp_path,
        (".symtab", 24 * index + 6, b"\0\0"),  # SHN_UNDEF
        (".rela.text.livepatch_lamp_light", 24 + 8, b"\4"),  # NONE becomes PLT32
        (".klp.rela.lamp..text.livepatch_lamp_light", 8, b"\0"),  # PLT32 becomes NONE
    )
    info = patch_info(Kernel.load(), path)
    assert (info.declared, info.missing, info.problems, info.holds) == (True, (name,), (), False)
    line = code_of(info, "lamp_light")[9]
    assert (line.text, line.comment) == (f"call {name}", "not in this kernel")


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        (b"\x31\xc0\xc3", "its init function does not call klp_enable_patch()"),  # xor eax, eax; ret
        (b"\xb8\xea\xff\xff\xff\xc3", "the init function of 'klp_lamp' failed (-EINVAL)"),
        (b"\x0f\x0b", "undefined instruction"),
        (b"\xeb\xfe", "did not return within 1,000 instructions"),
    ],
)
def test_an_init_function_that_declares_nothing_is_a_problem(
    kernel: Kernel, tmp_path: Path, code: bytes, problem: str
) -> None:
    kernel.machine.hub.instruction_budget = 1000
    # Ahead of the relocated instructions, whose fields are as they were.
    info = patch_info(kernel, changed(tmp_path, (".text.init_module", 5, code)))
    assert (info.declared, info.objects, info.holds) == (False, (), False)
    (found,) = info.problems
    assert problem in found
    assert len(info.references) == 6
    assert "klp_lamp" not in kernel.machine.modules.objects


def test_what_is_no_livepatch_module_is_refused(kernel: Kernel) -> None:
    with pytest.raises(KlpemuError, match="no livepatch module"):
        patch_info(kernel, LAMP)


# What it prints.


def test_the_text_has_everything(tmp_path: Path) -> None:
    outcome = klpemu("info", "--module", LAMP, KLP_LAMP)
    assert (outcome.status, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    for expected in (
        "  name              klp_lamp",
        "  depends           nothing",
        "  replace           no",
        "  states            7 (version 2)",
        "Object vmlinux",
        "Object lamp",
        "  call_same_two,1 -> livepatch_call_same_two+0x0/0x22 [klp_lamp]",
        "      replaces call_same_two+0x0/0x20, fentry site at call_same_two+0x0/0x20",
        "  2 klp relocations, written when the patch is loaded",
        "  1 klp relocation, written when lamp is there",
    ):
        assert expected in lines
    assert any("call glow+0x0/0x10 [lamp]" in line and "# klp lamp:glow,2" in line for line in lines)
    assert any(
        line.startswith("  .data.same_names+0x8  R_X86_64_64  vmlinux:same_name,2  = 0x") for line in lines
    )


def test_without_code_there_are_no_instructions() -> None:
    out = klpemu("info", "--no-code", KLP_LAMP).out
    assert "ret" not in out.split()
    assert "livepatch_lamp_light" in out


def test_at_and_t_syntax_is_there_for_who_asks() -> None:
    assert "subq $8, %rsp" in klpemu("info", "--att", KLP_LAMP).out


def test_a_patch_that_this_kernel_cannot_take_is_a_finding(tmp_path: Path) -> None:
    path = renamed(tmp_path, ".klp.sym.vmlinux.twin,2", ".klp.sym.vmlinux.twin,3")
    outcome = klpemu("info", str(path))
    assert outcome.status == 1
    assert "not resolved: symbol position 3 for symbol 'twin' in object 'vmlinux' not found" in outcome.out


def test_another_file_is_refused_in_one_line() -> None:
    outcome = klpemu("info", "builtin:fix_area.o")
    assert (outcome.status, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert "no livepatch module" in outcome.err


def test_a_budget_stops_an_endless_init_function(tmp_path: Path) -> None:
    path = changed(tmp_path, (".text.init_module", 5, b"\xeb\xfe"))
    outcome = klpemu("info", "--budget", "500", str(path))
    assert outcome.status == 1
    assert "within 500 instructions" in outcome.out


def test_parameters_and_replace_are_shown(tmp_path: Path) -> None:
    source = Image.open(fixture("klp_lamp.ko"))
    offset = bytes(source.contents(source.section(".modinfo") or source.sections[0])).index(b"vermagic=")
    text = b"parm=level:how bright\0parmtype=level:int\0"
    replace = (".data.patch", 24, b"\1")  # klp_patch.replace
    path = changed(tmp_path, (".modinfo", offset, text.ljust(45, b"\0")), replace)
    outcome = klpemu("info", str(path))
    assert "  parameter         level (int)  how bright" in outcome.out.splitlines()
    assert "  replace           yes: every older patch" in outcome.out.splitlines()


def test_the_object_says_the_same() -> None:
    found: dict[str, Any] = klpemu("info", "--json", "--module", LAMP, KLP_LAMP).object
    assert (found["verb"], found["holds"], found["name"], found["replace"]) == (
        "info",
        True,
        "klp_lamp",
        False,
    )
    assert found["states"] == [{"id": 7, "version": 2}]
    vmlinux, lamp = found["objects"]
    assert (vmlinux["name"], lamp["name"], lamp["loaded"]) == ("vmlinux", "lamp", True)
    assert sorted(lamp["callbacks"]) == ["post_unpatch", "pre_patch"]
    (light, _) = lamp["functions"]
    assert light["instructions"][2]["text"] == "call glow+0x0/0x10 [lamp]"
    assert len(found["klp_relocations"]) == 9
    last = found["klp_relocations"][-1]
    assert last["section"] == ".klp.rela.lamp..text.livepatch_lamp_flash"
    assert (last["type"], last["symbol"], last["addend"]) == ("R_X86_64_32S", "lamp:level,0", 0)
    assert last["resolved"] == "level+0x0/0x8 [lamp]"
    assert last["problem"] is None
