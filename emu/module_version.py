"""Was this module built for this kernel?  kernel/module/version.c, and the vermagic of kernel/module/main.c.

A module has the checksum of each symbol that it uses as it was where it was built (`__versions`); the kernel
image has its own beside its export tables.  A symbol or a struct that has changed in between is found so,
before anything of the module runs.  The built-in kernel has neither checksums nor a vermagic: it takes all.
"""

import errno
from struct import Struct
from typing import TYPE_CHECKING

from elf.errors import ElfError
from elf.image import Image
from emu.errno import KernelErrno
from emu.memory import read_string

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = ["MODULE_LAYOUT", "check_vermagic", "check_version", "versions"]

SECTION = "__versions"
MODVERSION_INFO = Struct("<Q56s")  # crc, name
MODULE_LAYOUT = "module_layout"  # its checksum stands for struct module and what is in it


def versions(image: Image) -> dict[str, int]:
    """The checksums that a module was built with, by symbol; empty without `__versions`."""
    section = image.section(SECTION)
    data = b"" if section is None else image.contents(section).tobytes()
    if len(data) % MODVERSION_INFO.size:
        raise ElfError(
            f"{SECTION} has {len(data)} bytes; an entry takes {MODVERSION_INFO.size}", where=image.path
        )
    return {
        name.split(b"\0")[0].decode("ascii", "backslashreplace"): crc
        for crc, name in MODVERSION_INFO.iter_unpack(data)
    }


def check_vermagic(machine: "Machine", image: Image, name: str) -> None:
    """ENOEXEC if the module's vermagic is another kernel's; with checksums its release does not matter."""
    wanted, found = _vermagic_of(machine), image.modinfo.get("vermagic", [""])[0]
    if not wanted or not found:
        return
    if image.section(SECTION) is not None:
        same = wanted.partition(" ")[2] == found.partition(" ")[2]
    else:
        same = wanted == found
    if not same:
        what = f"version magic '{found}' should be '{wanted}'"
        machine.log.pr_err(f"{name}: {what}")
        raise KernelErrno(errno.ENOEXEC, what, where=image.path, advice="build it for this kernel")
    if found != wanted:
        built_for, release = found.partition(" ")[0], wanted.partition(" ")[0]
        machine.log.pr_info(f"klpemu: {name}: built for {built_for}, and this kernel is {release}")


def check_version(
    machine: "Machine", image: Image, name: str, symbol: str, crc: int | None, number: int = errno.EINVAL
) -> None:
    """Raise if the module knows another `symbol` than the kernel, whose checksum is `crc` (None: unknown)."""
    known = versions(image).get(symbol)
    if crc is None or known is None or known == crc:
        return
    what = f"disagrees about version of symbol {symbol}"
    machine.log.pr_warn(f"{name}: {what}")
    built_for = image.modinfo.get("vermagic", ["an unknown kernel"])[0].split(" ")[0]
    release = _vermagic_of(machine).split(" ")[0]
    raise KernelErrno(
        number,
        what,
        where=image.path,
        advice=f"it was built for {built_for}, this kernel is {release or 'another one'}: build it again",
    )


def _vermagic_of(machine: "Machine") -> str:
    """`vermagic` of kernel/module/main.c; empty where the kernel has none."""
    address = machine.vmlinux.symbols.get("vermagic")
    return read_string(machine.space, address) if address is not None else ""
