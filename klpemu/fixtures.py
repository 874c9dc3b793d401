"""Where the built-in kernel, livepatches and scenarios are: inside an installed package, or in the source
tree.

Wherever a command or a scenario names a file, `builtin:NAME` names one of these, and `stock:NAME` a file of
the stock kernel that `make real` has fetched.
"""

import re
from pathlib import Path
from typing import Final

from elf.errors import KlpemuError
from klpemu import stock_kernel

__all__ = ["BUILTIN", "BUILTIN_KERNEL", "STOCK", "fixture", "locate", "shown"]

BUILTIN: Final = "builtin:"
STOCK: Final = "stock:"
BUILTIN_KERNEL: Final = "kernel.o"

MUSEUM: Final = "museum/"  # the folder of scenarios that show bugs
_HERE: Final = Path(__file__).resolve().parent
_FOLDERS: Final = {
    ".o": (_HERE / "fixtures", _HERE.parent / "fixtures" / "build"),
    ".toml": (_HERE / "scenarios", _HERE.parent / "fixtures" / "scenarios"),
}


def fixture(name: str) -> Path:
    """Path of a built-in object, or of a built-in scenario if the name ends in `.toml`."""
    folders = _FOLDERS.get(Path(name).suffix, _FOLDERS[".o"])
    for folder in folders:
        if Path(name).name == name.removeprefix(MUSEUM) and (folder / name).is_file():
            return folder / name
    there = sorted(
        each.name for folder in folders if folder.is_dir() for each in folder.iterdir() if each.is_file()
    )
    if not there:
        raise KlpemuError(
            f"the fixture {name} is missing",
            where=str(folders[-1]),
            advice="reinstall klpemu, or run make -C fixtures",
        )
    raise KlpemuError(
        "no such built-in file", where=f"{BUILTIN}{name}", advice=f"there are {', '.join(there)}"
    )


def stock(name: str) -> Path:
    """`vmlinuz` of the stock kernel in the cache, or `NAME.ko`, one of its modules or livepatch tests."""
    kernel = stock_kernel.find()
    if kernel is None:
        raise KlpemuError("there is no stock kernel", where=f"{STOCK}{name}", advice=stock_kernel.why_not())
    if name == "vmlinuz":
        return kernel.vmlinuz
    module = name.removesuffix(".ko").replace("-", "_")
    built = {**kernel.livepatch.samples, **kernel.livepatch.test_modules}
    return built.get(module) or kernel.module(module)


def locate(name: str, base: Path | None = None) -> Path:
    """The file that `name` means: a built-in one, one of the stock kernel, or a path.

    A path is relative to `base` if that is given.
    """
    if name.startswith(BUILTIN):
        return fixture(name.removeprefix(BUILTIN))
    if name.startswith(STOCK):
        return stock(name.removeprefix(STOCK))
    return Path(name) if base is None else base / name


def shown(text: object) -> str:
    """A path, or a text with paths in it, as people are shown it: by `builtin:` and `stock:` names."""
    result = str(text)
    for folders in _FOLDERS.values():
        for folder in folders:
            result = result.replace(f"{folder}/", BUILTIN)
    cache = f"{stock_kernel.cache_directory()}/"
    if cache in result:
        result = re.sub(rf"{re.escape(cache)}\S+?(?:/vmlinuz-[\w.-]*\w|\.ko)\b", _stock_name, result)
    return result


def _stock_name(path: re.Match[str]) -> str:
    """How `locate()` knows a file of the cache; older kernels there have no such names."""
    name = Path(path[0]).name
    name = name if name.endswith(".ko") else "vmlinuz"
    try:
        return f"{STOCK}{name}" if stock(name) == Path(path[0]) else path[0]
    except KlpemuError:
        return path[0]
