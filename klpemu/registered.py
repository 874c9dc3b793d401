"""Patches registered, enabled and unregistered one by one, inside of the variant `patches_registered`.

`Kernel.disable` switches a registered patch off; `Kernel.enabled` holds the registered patches, on or off.
"""

import errno
from os import fspath

from elf.errors import KlpemuError
from elf.image import Image
from emu.errno import KernelErrno
from emu.module_use import module_refcount
from klpemu.fixtures import locate
from klpemu.kernel import EnabledPatch, Kernel
from patches import core
from patches.livepatch import Patch
from patches.variants.registration import klp_register_patch, klp_unregister_patch

__all__ = ["enable", "register", "registered", "unregister"]


def register(kernel: Kernel, patch: Patch) -> None:
    """Load a patch's code and register it, which changes no function yet."""
    if patch.code is None:
        raise KlpemuError(
            "a patch without code", where=f"patch '{patch.name}'", advice="say which file has it"
        )
    image = Image.open(locate(fspath(patch.code)))
    kernel._serve(f"register {patch.name}", lambda: kernel._insmod(patch, image, klp_register_patch))


def registered(kernel: Kernel, name: str) -> EnabledPatch | None:
    """The registered patch of that name, on or off; None if there is none."""
    return next((each for each in kernel.enabled if each.patch.name == name), None)


def enable(kernel: Kernel, name: str) -> None:
    """Enable a registered patch (write 1 to its sysfs `enabled`), for the first time or again."""
    guest = _found(kernel, name).guest
    kernel._serve(f"enable {name}", lambda: core.enabled_store(kernel.klp, guest, True))


def unregister(kernel: Kernel, name: str) -> None:
    """Unload a disabled patch, as `rmmod` does: the exit function of its module unregisters it.

    Raises KernelErrno EWOULDBLOCK while the module is in use, which it is from when the patch is enabled
    until it has been disabled, and for ever once a transition was forced.
    """
    found = _found(kernel, name)
    if module_refcount(kernel.machine.view("module", found.module.struct)):
        raise KernelErrno(
            errno.EWOULDBLOCK,
            f"module '{name}' is in use",
            advice="disable its patch first",
        )

    def exit_module() -> None:
        klp_unregister_patch(kernel.klp, found.guest)
        kernel.klp.freed(found.guest)

    kernel._serve(f"unregister {name}", exit_module)


def _found(kernel: Kernel, name: str) -> EnabledPatch:
    found = registered(kernel, name)
    if found is None:
        raise KernelErrno(errno.ENOENT, f"patch '{name}' is not registered", advice="register it first")
    return found
