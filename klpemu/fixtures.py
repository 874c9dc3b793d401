"""Where the built-in kernel, livepatches and scenarios are: inside an installed package, or in the source
tree.

Wherever a command or a scenario names a file, `builtin:NAME` names one of these.
"""

from pathlib import Path
from typing import Final

from elf.errors import KlpemuError

__all__ = ["BUILTIN", "BUILTIN_KERNEL", "fixture", "locate", "shown"]

BUILTIN: Final = "builtin:"
BUILTIN_KERNEL: Final = "kernel.o"

_HERE: Final = Path(__file__).resolve().parent
_FOLDERS: Final = {
    ".o": (_HERE / "fixtures", _HERE.parent / "fixtures" / "build"),
    ".toml": (_HERE / "scenarios", _HERE.parent / "fixtures" / "scenarios"),
}


def fixture(name: str) -> Path:
    """Path of a built-in object, or of a built-in scenario if the name ends in `.toml`."""
    folders = _FOLDERS.get(Path(name).suffix, _FOLDERS[".o"])
    for folder in folders:
        if Path(name).name == name and (folder / name).is_file():
            return folder / name
    there = sorted(each.name for folder in folders if folder.is_dir() for each in folder.iterdir())
    if not there:
        raise KlpemuError(
            f"the fixture {name} is missing",
            where=str(folders[-1]),
            advice="reinstall klpemu, or run make -C fixtures",
        )
    raise KlpemuError(
        "no such built-in file", where=f"{BUILTIN}{name}", advice=f"there are {', '.join(there)}"
    )


def locate(name: str, base: Path | None = None) -> Path:
    """The file that `name` means: a built-in one, or a path, relative to `base` if that is given."""
    if name.startswith(BUILTIN):
        return fixture(name.removeprefix(BUILTIN))
    return Path(name) if base is None else base / name


def shown(text: object) -> str:
    """A path, or a text with paths in it, as people are shown it: built-in files by their `builtin:` name."""
    result = str(text)
    for folders in _FOLDERS.values():
        for folder in folders:
            result = result.replace(f"{folder}/", BUILTIN)
    return result
