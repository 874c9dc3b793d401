"""`klpemu info`: what a livepatch module is made of."""

import sys
from pathlib import Path

import click

from klpemu.fixtures import locate
from klpemu.info import patch_info
from klpemu.info_report import info_object, print_info
from klpemu.kernel import Kernel
from klpemu.output import Output
from klpemu.report import FINDINGS
from klpemu.verbs.options import att_option, budget_option, kernel_options, output_options

__all__ = ["info"]


@click.command(short_help="What a livepatch module is made of.")
@click.argument("patch", type=locate, metavar="PATCH.ko")
@kernel_options
@click.option("--no-code", is_flag=True, help="Leave out the instructions of the functions.")
@budget_option
@att_option
@output_options
def info(
    patch: Path,
    kernel: Path | None,
    modules: tuple[Path, ...],
    no_code: bool,
    budget: int | None,
    att: bool,
    as_json: bool,
    color: str,
) -> None:
    """Explain a livepatch module: objects, functions, callbacks, states, klp relocations, and its code.

    Names are resolved against the kernel and the modules that are loaded, and stand in the disassembly where
    klp relocations will be written, too.  The module's init function is run to see what it declares; nothing
    is enabled.

    \b
    klpemu info --module builtin:lamp.ko builtin:klp_lamp.ko

    Exit status: 0 if this kernel has what the patch needs now, 1 if not, 2 if a file is refused.
    """
    output = Output("info", as_json=as_json, color=color)
    booted = Kernel.load(kernel)
    if budget:
        booted.machine.hub.instruction_budget = budget
    for module in modules:
        booted.load_module(module)
    found = patch_info(booted, patch, att=att)
    print_info(output, found, code=not no_code)
    output.finish(info_object(found))
    sys.exit(0 if found.holds else FINDINGS)
