"""Modules loaded and removed as kmod does it: with what they depend on, their parameters, init and exit."""

import errno
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elf.errors import KlpemuError
from elf.image import Image
from emu.errno import KernelErrno
from emu.module import LoadedObject, module_name
from emu.module_use import module_refcount, users_of
from klpemu.fixtures import locate

if TYPE_CHECKING:
    from klpemu.kernel import Kernel

__all__ = ["Modprobe"]


class Modprobe:
    """Loads and removes the modules of one kernel; all of it runs in services."""

    def __init__(self, kernel: "Kernel") -> None:
        self._kernel = kernel
        self._modules = kernel.machine.modules
        self._patches = kernel.patches
        self._modules.trace_module_load = self._trace_module_load
        self._before: set[int] = set()  # what was allocated before the module now being loaded

    def load(self, image: Image) -> LoadedObject:
        """Place a module; nothing of it runs."""
        before = self._patches.allocations().keys()
        loaded = self._modules.load_module(image)
        self._patches.baseline |= self._patches.allocations().keys() - before
        self._patches.watch(loaded)
        return loaded

    def unload(self, name: str) -> None:
        """Remove a module without running its exit function; refused while a patch has its code in it."""
        loaded = self._modules.objects.get(name)
        if loaded is not None and name and self._is_held(loaded):
            enabled = any(each.patch.name == name for each in self._patches.enabled)
            advice = f"disable '{name}' first" if enabled else "a forced patch stays for ever"
            raise KernelErrno(errno.EWOULDBLOCK, f"module '{name}' is in use", advice=advice)
        self._modules.unload_module(name)
        self._patches.baseline &= self._patches.allocations().keys()

    def insmod(self, image: Image) -> str:
        """Load a livepatch module, which goes when its patch is gone."""
        if "livepatch" not in image.modinfo:
            raise KlpemuError(
                "no livepatch module (its modinfo does not say livepatch=Y)",
                where=image.path,
                advice="give old=new pairs for an object that only has the code",
            )
        name = name_of(image)
        if name in self._modules.objects:
            raise KernelErrno(errno.EEXIST, f"module '{name}' is loaded already", where=image.path)
        self._patches.allocated[name] = set()
        try:
            return self._init(image, "")
        finally:
            if name not in self._modules.objects:
                self._patches.allocated.pop(name, None)

    def modprobe(self, path: str, parameters: str) -> str:
        """Load a module and first what it depends on; one that is loaded already stays as it is."""
        located = locate(path)
        image = Image.open(located)
        self._load_with_depends(image, located, parameters, [])
        return name_of(image)

    def rmmod(self, name: str) -> None:
        """Remove a module: its exit function runs."""
        self._modules.delete_module(name)
        self._patches.baseline &= self._patches.allocations().keys()

    def _load_with_depends(self, image: Image, path: Path, parameters: str, chain: Sequence[str]) -> None:
        name = name_of(image)
        if name in chain:
            circle = " needs ".join([*chain[chain.index(name) :], name])
            raise KlpemuError(
                f"modules depend on each other: {circle}",
                where=image.path,
                advice="no order of loading them works; correct their depends=",
            )
        if name in self._modules.objects:
            return
        for each in depends_of(image):
            if each not in self._modules.objects:
                found = find_module(path, each)
                if found is not None:  # or it may be in the kernel itself: the symbols will tell
                    self._load_with_depends(Image.open(found), found, "", [*chain, name])
        self._init(image, parameters)

    def _init(self, image: Image, parameters: str) -> str:
        self._patches.refused = None
        before = self._patches.allocations().keys()
        self._before = self._patches.live()
        try:
            loaded = self._modules.init_module(image, parameters)
        except KernelErrno as error:
            if self._patches.refused is not None:
                raise self._patches.refused from error
            raise
        if not self._is_livepatch(loaded):
            self._patches.baseline |= self._patches.allocations().keys() - before
        return loaded.name

    def _trace_module_load(self, loaded: LoadedObject) -> None:
        """Before init: what was allocated so far is the module's own, what comes now may be a patch's."""
        new = self._patches.live() - self._before
        if loaded.name in self._patches.allocated:
            self._patches.allocated[loaded.name] = new
        else:
            self._patches.baseline |= new
        self._patches.watch(loaded)

    def _is_held(self, loaded: LoadedObject) -> bool:
        """Somebody other than the modules that link against it has a reference."""
        module = self._view(loaded)
        return module_refcount(module) > len(users_of(module))

    def _is_livepatch(self, loaded: LoadedObject) -> bool:
        return bool(self._view(loaded).klp)

    def _view(self, loaded: LoadedObject) -> Any:
        return self._kernel.machine.view("module", loaded.struct)


def name_of(image: Image) -> str:
    """What a module is called: as its modinfo says, else as its file."""
    return image.modinfo.get("name", [module_name(image.path)])[0]


def depends_of(image: Image) -> list[str]:
    """Names of the modules that must be there first, in modinfo's order."""
    names = ",".join(image.modinfo.get("depends", [])).replace("-", "_")
    return [each for each in names.split(",") if each]


def find_module(path: Path, name: str) -> Path | None:
    """The file of a module: beside the one that needs it, or in the same tree of modules."""
    beside = path.resolve().parent
    # lib/modules/<release>
    tree = next((each for each in (beside, *beside.parents) if each.parent.name == "modules"), None)
    for folder, pattern in ((beside, "*.ko"), (tree, "**/*.ko")):
        if folder is not None:
            found = sorted(each for each in folder.glob(pattern) if module_name(each.name) == name)
            if found:
                return found[0]
    return None
