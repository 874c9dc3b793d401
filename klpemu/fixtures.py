"""Where the built-in kernel and livepatches are: inside an installed package, or in the source tree."""

from pathlib import Path

from elf.errors import KlpemuError

__all__ = ["BUILTIN_KERNEL", "fixture"]

BUILTIN_KERNEL = "kernel.o"


def fixture(name: str) -> Path:
    """Path of a built fixture."""
    here = Path(__file__).resolve().parent
    for directory in (here / "fixtures", here.parent / "fixtures" / "build"):
        if (directory / name).is_file():
            return directory / name
    raise KlpemuError(
        f"the fixture {name} is missing",
        where=str(here.parent / "fixtures" / "build"),
        advice="reinstall klpemu, or run make -C fixtures",
    )
