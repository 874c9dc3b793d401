"""Where modprobe finds modules: `.ko` files below some directories, by name, and what each says of itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from elf.errors import KlpemuError
from elf.image import Image
from klpemu.fixtures import fixture

__all__ = ["ModuleFile", "ModuleTree", "plain_name"]


def plain_name(name: str) -> str:
    """A module's name with underscores: for modprobe and the kernel `-` and `_` are the same."""
    return name.replace("-", "_")


@dataclass(frozen=True)
class ModuleFile:
    """A `.ko` file."""

    path: Path

    @cached_property
    def image(self) -> Image:
        """The file as read; raises ElfError."""
        return Image.open(self.path)

    @property
    def name(self) -> str:
        """What the module is called in the kernel."""
        return plain_name(self.path.name.partition(".")[0])

    @property
    def depends(self) -> list[str]:
        """The modules that have to be there first."""
        said = self.image.modinfo.get("depends", [])
        return [name for each in said for name in each.split(",") if name]

    def fields(self) -> list[tuple[str, str]]:
        """What `.modinfo` says, in its order; parameters come last, with their types, the last one first.

        That is how kmod has them.
        """
        section = self.image.section(".modinfo")
        entries = [] if section is None else self.image.contents(section).tobytes().split(b"\0")
        said = [each.decode("utf-8", "replace").partition("=") for each in entries if b"=" in each]
        fields = [(key, value) for key, _, value in said if key not in ("parm", "parmtype")]
        described: dict[str, str] = {}
        types: dict[str, str] = {}
        for key, _, value in said:
            if key in ("parm", "parmtype"):
                parameter, _, text = value.partition(":")
                (described if key == "parm" else types)[parameter] = text
        parameters = [value.partition(":")[0] for key, _, value in said if key in ("parm", "parmtype")]
        for parameter in reversed(list(dict.fromkeys(parameters))):
            kind = types.get(parameter)
            if parameter not in described:
                fields.append(("parm", f"{parameter}:{kind}"))
                continue
            shown = "" if kind is None else f" ({kind})"
            fields.append(("parm", f"{parameter}:{described[parameter]}{shown}"))
        return fields


class ModuleTree:
    """The modules below `directories`; the first directory that has a name decides.

    `release` stands for the directory in what modprobe says when it finds nothing.
    """

    def __init__(self, directories: Sequence[Path], release: str) -> None:
        self.directories = directories
        self.release = release

    @cached_property
    def _files(self) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for directory in self.directories:
            for path in sorted(directory.rglob("*.ko")):
                found.setdefault(plain_name(path.stem), path)
        return found

    def find(self, name: str) -> ModuleFile | None:
        """The module of a name, among the built-in ones last."""
        path = self._files.get(plain_name(name))
        if path is None:
            try:
                path = fixture(f"{plain_name(name)}.ko")
            except KlpemuError:
                return None
        return ModuleFile(path)

    def with_dependencies(self, module: ModuleFile) -> list[ModuleFile]:
        """A module, and before it those that it needs, in the order in which they have to be loaded.

        One that is nowhere may be a part of the kernel: the symbols will tell.
        """
        order: dict[str, ModuleFile] = {}
        self._visit(module, order, ())
        return list(order.values())

    def _visit(self, module: ModuleFile, order: dict[str, ModuleFile], above: tuple[str, ...]) -> None:
        if module.name in order or module.name in above:
            return
        for name in module.depends:
            needed = self.find(name)
            if needed is not None:
                self._visit(needed, order, (*above, module.name))
        order[module.name] = module
