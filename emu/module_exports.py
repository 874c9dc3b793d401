"""What modules link against: EXPORT_SYMBOL and EXPORT_SYMBOL_GPL, namespaces, and what a licence allows.

find_symbol() to simplify_symbols() of kernel/module/main.c.  A kernel image without tables of its own, as the
built-in one, exports all it defines, and the functions answered in Python.
"""

import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from elf.errors import SymbolError
from elf.image import Image
from elf.symbols import SHN_UNDEF, STB_WEAK, Symbol
from emu.errno import KernelErrno
from emu.memory import Memory, read_string
from emu.module_version import MODULE_LAYOUT, check_version

if TYPE_CHECKING:
    from emu.machine import Machine
    from emu.module import LoadedObject

__all__ = ["Exports", "KernelSymbol", "UnknownSymbol", "kernel_symbols_at"]

KERNEL_SYMBOL_SIZE: Final = 12
# On the reference kernel, of what is answered in Python: EXPORT_SYMBOL_GPL.
# Of what the built-in kernel answers, EXPORT_SYMBOL_GPL on the reference kernel.
GPL_ONLY: Final = frozenset(
    {
        "add_timer_on",
        "crypto_register_alg",
        "crypto_register_algs",
        "crypto_register_shash",
        "crypto_unregister_alg",
        "crypto_unregister_algs",
        "crypto_unregister_shash",
        "klp_enable_patch",
        "klp_get_prev_state",
        "klp_get_state",
        "klp_shadow_alloc",
        "klp_shadow_free",
        "klp_shadow_free_all",
        "klp_shadow_get",
        "klp_shadow_get_or_alloc",
        "kobject_create_and_add",
        "param_ops_bool_enable_only",
        "param_set_bool_enable_only",
        "round_jiffies_relative",
        "start_poll_synchronize_rcu",
    }
)
ALLOWED_UNDEFINED: Final = "_GLOBAL_OFFSET_TABLE_"  # ignore_undef_symbol()


class UnknownSymbol(KernelErrno, SymbolError):  # noqa: N818
    """A symbol that a module needs and nobody exports to it."""


@dataclass(frozen=True, slots=True)
class KernelSymbol:
    """One exported symbol: a guest virtual address, and the object that exports it ("" is vmlinux).

    `crc` is the checksum of its declaration, None where the object has none.
    """

    name: str
    value: int
    owner: str
    gpl_only: bool = False
    namespace: str = ""
    crc: int | None = None


def kernel_symbols_at(
    memory: Memory, start: int, count: int, owner: str, *, gpl_only: bool, crcs: int | None = None
) -> Iterator[KernelSymbol]:
    """The entries of a table of struct kernel_symbol in guest memory: three distances from themselves.

    `crcs` is where the table of their checksums lies, if there is one.
    """
    data = memory.read(start, count * KERNEL_SYMBOL_SIZE) if count else b""
    checksums = memoryview(memory.read(crcs, 4 * count)).cast("I") if count and crcs is not None else None
    for index in range(count):
        at = start + index * KERNEL_SYMBOL_SIZE
        value, name, namespace = (
            int.from_bytes(data[at - start + step : at - start + step + 4], "little", signed=True)
            for step in (0, 4, 8)
        )
        yield KernelSymbol(
            read_string(memory, at + 4 + name),
            at + value,
            owner,
            gpl_only,
            read_string(memory, at + 8 + namespace) if namespace else "",
            None if checksums is None else checksums[index],
        )


class Exports:
    """The exported symbols of one machine's objects; `objects` are the loader's."""

    def __init__(self, machine: "Machine", objects: "dict[str, LoadedObject]") -> None:
        self._machine = machine
        self._objects = objects
        # What to do with a symbol that exists nowhere; the bench binds it to a stub that fails when called.
        self.missing: Callable[[Symbol, str], int] = _refuse_missing

    def find_symbol(self, name: str, *, gplok: bool) -> KernelSymbol | None:
        """The symbol, from vmlinux first, then from the modules; None for what is not for the caller."""
        found = self._of_vmlinux(name)
        if found is None or (found.gpl_only and not gplok):
            exported = (each.exports.get(name) for each in self._objects.values())
            found = next((each for each in exported if each and (gplok or not each.gpl_only)), None)
        return found

    def check_modstruct_version(self, image: Image, name: str) -> None:
        """ENOEXEC if the module's struct module is another one than the kernel's."""
        found = self._of_vmlinux(MODULE_LAYOUT)
        if found is not None:
            check_version(self._machine, image, name, MODULE_LAYOUT, found.crc, errno.ENOEXEC)

    def exports_of(self, module: "LoadedObject") -> dict[str, KernelSymbol]:
        """What a module in guest memory exports, by name."""
        view = self._machine.view("module", module.struct)
        memory = self._machine.space
        plain = kernel_symbols_at(memory, view.syms, view.num_syms, module.name, gpl_only=False)
        gpl = kernel_symbols_at(memory, view.gpl_syms, view.num_gpl_syms, module.name, gpl_only=True)
        found: dict[str, KernelSymbol] = {}
        for each in (*plain, *gpl):
            found.setdefault(each.name, each)
        return found

    def verify_exported_symbols(self, module: "LoadedObject") -> None:
        """ENOEXEC if the kernel or another module exports a symbol of that name."""
        for name in module.exports:
            found = self.find_symbol(name, gplok=True)
            if found is not None:
                what = f"exports duplicate symbol {name} (owned by {found.owner or 'kernel'})"
                self._machine.log.pr_err(f"{module.name}: {what}")
                raise KernelErrno(errno.ENOEXEC, what, where=module.name)

    def simplify_symbols(
        self, image: Image, name: str, *, gplok: bool, ref_module: Callable[[str], None]
    ) -> dict[int, int]:
        """The address of each undefined symbol, by its index; `ref_module` gets the modules that own them.

        All are looked for before the module is refused, so that the log names every one that is missing.
        """
        values: dict[int, int] = {}
        failed: KernelErrno | SymbolError | None = None
        for symbol in image.symbols:
            if symbol.section != SHN_UNDEF or not symbol.index:
                continue
            try:
                values[symbol.index] = self._resolve(image, symbol, name, gplok=gplok, ref_module=ref_module)
            except (KernelErrno, SymbolError) as error:
                number = error.number if isinstance(error, KernelErrno) else errno.ENOENT
                self._machine.log.pr_warn(f"{name}: Unknown symbol {symbol.name} (err -{number})")
                failed = failed or error
        if failed is not None:
            raise failed
        return values

    def _resolve(
        self, image: Image, symbol: Symbol, name: str, *, gplok: bool, ref_module: Callable[[str], None]
    ) -> int:
        found = self.find_symbol(symbol.name, gplok=gplok)
        if found is not None:
            check_version(self._machine, image, name, found.name, found.crc)
            if found.namespace and found.namespace not in image.modinfo.get("import_ns", []):
                what = (
                    f"module uses symbol ({found.name}) from namespace {found.namespace}, "
                    "but does not import it."
                )
                self._machine.log.pr_err(f"{name}: {what}")
                raise KernelErrno(errno.EINVAL, what, where=name)
            ref_module(found.owner)
            return found.value
        if symbol.binding == STB_WEAK or symbol.name == ALLOWED_UNDEFINED:  # it may stay NULL
            return 0
        if not gplok and self.find_symbol(symbol.name, gplok=True) is not None:
            raise UnknownSymbol(
                errno.ENOENT,
                f"Unknown symbol {symbol.name}",
                where=name,
                advice="it is exported to modules under a GPL-compatible license only",
            )
        return self.missing(symbol, name)

    def _of_vmlinux(self, name: str) -> KernelSymbol | None:
        machine = self._machine
        symbols = machine.vmlinux.symbols
        if machine.vmlinux.exported is None:
            machine.vmlinux.exported = dict(self._tables_of_vmlinux())
        if machine.vmlinux.exported:
            found: KernelSymbol | None = machine.vmlinux.exported.get(name)
            return found
        address = symbols.get(name)
        return None if address is None else KernelSymbol(name, int(address), "", name in GPL_ONLY)

    def _tables_of_vmlinux(self) -> Iterator[tuple[str, KernelSymbol]]:
        """What a linked image exports, by name: of one that is in both tables, the plain one comes last."""
        symbols = self._machine.vmlinux.symbols
        for suffix, gpl_only in (("_gpl", True), ("", False)):
            start, stop = symbols.get(f"__start___ksymtab{suffix}"), symbols.get(f"__stop___ksymtab{suffix}")
            if start is not None and stop is not None:
                count = (stop - start) // KERNEL_SYMBOL_SIZE
                crcs = symbols.get(f"__start___kcrctab{suffix}")
                memory = self._machine.space
                for each in kernel_symbols_at(memory, start, count, "", gpl_only=gpl_only, crcs=crcs):
                    yield each.name, each


def _refuse_missing(symbol: Symbol, name: str) -> int:
    raise UnknownSymbol(
        errno.ENOENT,
        f"Unknown symbol {symbol.name}",
        where=name,
        advice="load the module that exports it first; klpemu has no export of that name",
    )
