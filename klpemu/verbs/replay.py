"""`klpemu replay`: do what a real kernel did, and compare."""

import sys
from pathlib import Path

import click

from elf.errors import KlpemuError
from klpemu import stock_kernel
from klpemu.boot_machine import HANDLERS, OWN
from klpemu.fixtures import locate
from klpemu.kernel import Kernel
from klpemu.module_tree import ModuleTree
from klpemu.output import Output
from klpemu.recording import read_recording
from klpemu.replay import Replay, Step
from klpemu.report import FINDINGS
from klpemu.system_commands import release_of
from klpemu.verbs.options import output_options

__all__ = ["replay"]


@click.command(short_help="Replay what a real kernel did, and compare.")
@click.argument("recording", type=click.Path(path_type=Path), metavar="RECORDING.json")
@click.option(
    "--kernel",
    type=locate,
    metavar="IMAGE",
    help="The kernel image; by default the recorded one if `make real` has it, else stock:vmlinuz.",
)
@click.option(
    "--modules",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    multiple=True,
    metavar="DIR",
    help="Where the modules are looked for first; may be repeated.",
)
@click.option(
    "--handler",
    type=click.Choice(HANDLERS),
    help="Whose code redirects calls: the image's own (the default if it has some) or klpemu's.",
)
@click.option("--cpu", metavar="NAME", help="The kind of CPU; that of the recording by default.")
@click.option("--cpus", type=click.IntRange(1, 64), help="Number of vCPUs; as recorded by default.")
@output_options
def replay(
    recording: Path,
    kernel: Path | None,
    modules: tuple[Path, ...],
    handler: str | None,
    cpu: str | None,
    cpus: int | None,
    as_json: bool,
    color: str,
) -> None:
    """Give an emulated kernel the commands that a real one was given, and compare what both did.

    Compared are the exit status and the output of each command, and at each snapshot the bytes of fentry
    sites and trampolines, the ops and their func_stack, enabled_functions, sysfs, /proc/modules; then the
    log, and each change of text.  What cannot be compared, as with another build of the kernel, is said.

    Modules are looked for in the directories given, among the kernel's own that `make real` has built, and
    among the built-in ones: own_a.ko, own_b.ko, own_c.ko.

    Exit status: 0 the same, 1 there are differences, 2 the recording cannot be read or replayed.
    """
    output = Output("replay", as_json=as_json, color=color)
    read = read_recording(recording)
    booted = Kernel.load(
        kernel or _image(read.kernel),
        cpus=cpus or _count(read.cpus, read.path),
        handler=handler,
        cpu=cpu or read.cpu,
        command_line=read.boot_line,
    )
    tree = ModuleTree([*modules, *_built()], release_of(booted))
    replayed = Replay(read, booted, tree, own_handler=handler == OWN)
    replayed.check()
    output.fact("recorded", f"{read.kernel}, {read.cpu}, {read.cpus} CPU")
    output.fact("replayed", f"{release_of(booted)}, {cpu or read.cpu}, {len(booted.machine.cpus)} CPU")
    for each in replayed.left_out:
        output.fact("not compared", each)
    steps = []
    for step in replayed.steps():
        steps.append(step)
        _print(output, step)
    for remark in replayed.remarks:
        output.line((remark, "dim"))
    differences = sum(len(each.differences) for each in steps)
    compared = f"{sum(each.compared for each in steps):,} facts in {len(steps)} steps compared"
    if differences:
        output.line((f"{compared}, {differences} differ", "bold red"))
    else:
        output.line((f"{compared}: all the same", "bold green"))
    output.finish(
        {
            "holds": not differences,
            "recorded": read.kernel,
            "same_build": replayed.same_build,
            "not_compared": replayed.left_out,
            "remarks": replayed.remarks,
            "steps": [_step_object(each) for each in steps],
        }
    )
    sys.exit(FINDINGS if differences else 0)


def _count(cpus: int, path: str) -> int:
    if not 1 <= cpus <= 64:
        raise KlpemuError(f"meta.base_smp: {cpus} CPUs", where=path, advice="1 to 64 can be emulated")
    return cpus


def _image(recorded: str) -> Path:
    """The stock kernel that was recorded, if it is in the cache, else the newest there."""
    kernels = (stock_kernel.find(word) for word in recorded.split() if word[0].isdigit())
    found = next((each for each in kernels if each is not None), None)
    return locate("stock:vmlinuz") if found is None else found.vmlinuz


def _built() -> list[Path]:
    stock = stock_kernel.find()
    return [stock.livepatch.directory] if stock is not None else []


def _print(output: Output, step: Step) -> None:
    facts = "fact" if step.compared == 1 else "facts"
    output.line((step.name, "bold"), (f"  {step.compared} {facts}", "dim"))
    for each in step.differences:
        output.line((each.what, "red"), indent=2)
        output.line(each.expected, label="expected  ", indent=4)
        output.line(each.found, label="found     ", indent=4)


def _step_object(step: Step) -> dict[str, object]:
    return {
        "step": step.name,
        "compared": step.compared,
        "differences": [
            {"what": each.what, "expected": each.expected, "found": each.found} for each in step.differences
        ],
    }
