"""Modules with hostile contents: an errno or a clear error, and the machine goes on as it was."""

from pathlib import Path
from struct import pack_into, unpack_from

import pytest

from elf.image import Image
from klpemu import Kernel, KlpemuError

BUILD = Path(__file__).resolve().parents[2] / "fixtures" / "build"


def changed_header(tmp_path: Path, name: str, section: str, offset: int, value: int) -> Path:
    """A copy of a fixture with 8 bytes of a section's header changed."""
    data = bytearray((BUILD / name).read_bytes())
    index = next(each.index for each in Image.open(BUILD / name).sections if each.name == section)
    (table,) = unpack_from("<Q", data, 40)
    pack_into("<Q", data, table + 64 * index + offset, value)
    path = tmp_path / name
    path.write_bytes(data)
    return path


def replaced(tmp_path: Path, name: str, old: bytes, new: bytes) -> Path:
    """A copy of a fixture with some bytes changed."""
    data = (BUILD / name).read_bytes()
    assert data.count(old) == 1
    assert len(old) == len(new)
    path = tmp_path / name
    path.write_bytes(data.replace(old, new))
    return path


def refused(kernel: Kernel, path: Path, parameters: str = "") -> str:
    """Load the module, which must fail, and see that everything still stands; returns the error."""
    kernel.machine.hub.instruction_budget = 50_000
    with pytest.raises(KlpemuError) as raised:
        kernel.modprobe(path, parameters)
    assert [name for name in kernel.machine.modules.objects if name] == []
    kernel.verify("after").raise_for_findings()
    assert kernel.call("area_of", 3, 4) == 7
    kernel.modprobe("builtin:klp_area.ko")
    assert kernel.call("area_of", 3, 4) == 12
    kernel.disable("klp_area")
    kernel.rmmod("klp_area")
    kernel.verify("after another one").raise_for_findings()
    text = str(raised.value)
    assert "\n" not in text
    return text


@pytest.fixture
def kernel() -> Kernel:
    return Kernel.load()


@pytest.mark.parametrize("size", [0, 8, 200, 896 - 64, 896 + 64])
def test_a_struct_module_of_another_size_is_refused(tmp_path: Path, kernel: Kernel, size: int) -> None:
    error = refused(kernel, changed_header(tmp_path, "exporter.ko", ".gnu.linkonce.this_module", 32, size))
    assert "must match the kernel's built struct module size" in error
    assert "ENOEXEC" in error


@pytest.mark.parametrize("name", ["init_fails", "init_endless", "init_jumps"])
def test_an_init_that_does_not_do_what_it_should_is_refused(kernel: Kernel, name: str) -> None:
    error = refused(kernel, BUILD / f"{name}.ko")
    assert name in error


def test_a_klp_section_that_names_no_object_is_refused(tmp_path: Path, kernel: Kernel) -> None:
    path = replaced(
        tmp_path, "klp_lamp.ko", b".klp.rela.lamp..data.level_at\0", b".klp.rela.......data.level_at\0"
    )
    assert "incorrectly formatted name" in refused(kernel, path)


def test_an_init_pointer_that_leads_outside_is_refused(tmp_path: Path, kernel: Kernel) -> None:
    """The addend of the relocation of __this_module.init points far behind the function."""
    image = Image.open(BUILD / "exporter.ko")
    rela = next(each for each in image.sections if each.name == ".rela.gnu.linkonce.this_module")
    data = bytearray((BUILD / "exporter.ko").read_bytes())
    entries = [rela.offset + 24 * index for index in range(rela.size // 24)]
    (at,) = [at for at in entries if unpack_from("<Q", data, at)[0] == 312]
    pack_into("<q", data, at + 16, 0x1000_0000)
    path = tmp_path / "exporter.ko"
    path.write_bytes(data)
    assert "jump to unmapped" in refused(kernel, path)


def test_klp_relocations_of_what_is_freed_after_init_are_refused(tmp_path: Path, kernel: Kernel) -> None:
    path = replaced(tmp_path, "klp_lamp.ko", b".rela.data.level_at\0", b".rela.init.level_at\0")
    assert "freed after init" in refused(kernel, path)


def test_an_endless_list_of_parameters_is_cut(kernel: Kernel) -> None:
    error = refused(kernel, BUILD / "options.ko", "word=" + "x" * 2000)
    assert "ENOSPC" in error


def test_a_pre_patch_callback_that_faults_leaves_nothing(tmp_path: Path, kernel: Kernel) -> None:
    kernel.modprobe("builtin:lamp.ko")
    path = callback_outside(tmp_path, "pre_patch")
    with pytest.raises(KlpemuError, match="jump to unmapped"):
        kernel.modprobe(path)
    assert [name for name in kernel.machine.modules.objects if name] == ["lamp"]
    assert kernel.enabled == []
    kernel.verify().raise_for_findings()


def test_a_callback_that_faults_when_a_patch_goes_does_not_keep_it(tmp_path: Path, kernel: Kernel) -> None:
    kernel.modprobe("builtin:lamp.ko")
    kernel.modprobe(callback_outside(tmp_path, "post_unpatch"))
    kernel.verify().raise_for_findings()
    with pytest.raises(KlpemuError, match="jump to unmapped"):
        kernel.disable("klp_lamp")
    assert kernel.enabled == []
    kernel.verify().raise_for_findings()
    kernel.rmmod("klp_lamp")
    kernel.verify().raise_for_findings()


def callback_outside(tmp_path: Path, which: str) -> Path:
    """klp_lamp.ko, one of whose callbacks lies behind its text."""
    image = Image.open(BUILD / "klp_lamp.ko")
    rela = next(each for each in image.sections if each.name == ".rela.data.objs")
    data = bytearray((BUILD / "klp_lamp.ko").read_bytes())
    symbols = image.symbols
    for at in range(rela.offset, rela.offset + rela.size, 24):
        _, info, _ = unpack_from("<QQq", data, at)
        symbol = symbols[info >> 32]
        if which in (symbol.name, image.sections[symbol.section].name.removeprefix(".text.")):
            pack_into("<q", data, at + 16, 0x1000_0000)
            break
    else:
        pytest.fail(f"no callback {which}")
    path = tmp_path / "klp_lamp.ko"
    path.write_bytes(data)
    return path
