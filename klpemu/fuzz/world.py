"""What a campaign plays with, from the command line: a world file, or a kernel with modules and patches."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from elf.errors import KlpemuError
from elf.image import Image
from klpemu.fixtures import fixture, shown
from klpemu.modprobe import name_of
from klpemu.patch_argument import parse_patches
from klpemu.scenario import Action, DeclaredTask, Scenario, Step
from klpemu.scenario_file import read_scenario
from patches.variants import variant

__all__ = ["BUILTIN_WORLD", "world_of"]

BUILTIN_WORLD = "fuzz.toml"

# Of a kernel of which nothing is known no function is called: what tasks do on every kernel.
_TASKS = (
    DeclaredTask("sleeper", ("sleep(300)",), repeat=20, start=False),
    DeclaredTask("waiter", ("pause",), start=False),
    DeclaredTask("parent", ("fork", "user(20)", "sleep(50)"), repeat=3, start=False),
    DeclaredTask("kthread", ("sleep(40)", "yield"), kthread=True, repeat=20, start=False),
)


def world_of(
    world: Path | None,
    kernel: Path | None,
    handler: str | None,
    cpu: str,
    modules: Sequence[Path],
    patches: Sequence[str],
    variants: Sequence[str],
) -> Scenario:
    """The world of a campaign; raises `KlpemuError` for what cannot be read, or does not go together."""
    for each in variants:
        variant(each)
    if world is None and kernel is None and not modules and not patches:
        world = fixture(BUILTIN_WORLD)
    if world is not None:
        if kernel is not None or modules or patches:
            raise KlpemuError(
                "a world says itself which kernel, modules and patches there are",
                where=shown(world),
                advice="write them into it, or leave it out",
            )
        read = read_scenario(world)
        return replace(read, variants=(*read.variants, *variants)).anchored()
    names = [(each, name_of(Image.open(each))) for each in modules]
    return Scenario(
        kernel=kernel,
        handler=handler,
        cpu=cpu,
        cpus=2,
        patches=parse_patches(patches),
        tasks={each.name: each for each in _TASKS},
        steps=[
            *(Step(Action.LOAD, shown(path)) for path, _ in names),
            *(Step(Action.UNLOAD, name) for _, name in names),
            *(Step(Action.MODPROBE, shown(path)) for path, _ in names),
            *(Step(Action.RMMOD, name) for _, name in names),
        ],
        variants=tuple(variants),
    ).anchored()
