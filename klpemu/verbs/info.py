"""`klpemu info`: what a livepatch module is made of, and what a kernel."""

import sys
from pathlib import Path

import click

from klpemu.fixtures import locate
from klpemu.info import patch_info
from klpemu.info_report import info_object, print_info
from klpemu.kernel import Kernel
from klpemu.kernel_info import kernel_info, kernel_object, print_kernel
from klpemu.output import Output
from klpemu.report import FINDINGS
from klpemu.verbs.options import att_option, budget_option, kernel_options, output_options

__all__ = ["info"]


@click.command(short_help="What a livepatch module is made of, or a kernel.")
@click.argument("patch", type=locate, metavar="[PATCH.ko]", required=False)
@kernel_options
@click.option("--no-code", is_flag=True, help="Leave out the instructions of the functions.")
@budget_option
@att_option
@output_options
def info(
    patch: Path | None,
    kernel: Path | None,
    handler: str | None,
    cpu: str,
    system_map: Path | None,
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

    Without a module it explains the kernel: sites, what was applied to its text, which functions are answered
    in Python.

    \b
    klpemu info --module builtin:lamp.ko builtin:klp_lamp.ko
    klpemu info --kernel /boot/vmlinuz-6.1.0-56-amd64

    Exit status: 0 if this kernel has what the patch needs now, 1 if not, 2 if a file is refused.
    """
    output = Output("info", as_json=as_json, color=color)
    booted = Kernel.load(kernel, handler=handler, cpu=cpu, system_map=system_map)
    if budget:
        booted.machine.hub.instruction_budget = budget
    for module in modules:
        booted.load_module(module)
    if patch is None:
        explained = kernel_info(booted)
        print_kernel(output, explained)
        output.finish(kernel_object(explained))
        sys.exit(0)
    found = patch_info(booted, patch, att=att)
    print_info(output, found, code=not no_code)
    output.finish(info_object(found))
    sys.exit(0 if found.holds else FINDINGS)
