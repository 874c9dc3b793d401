"""Options that several verbs have."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from emu.cpu_features import CPUS
from klpemu.boot_machine import DEFAULT_CPU, HANDLERS
from klpemu.fixtures import locate
from klpemu.output import COLORS

__all__ = ["att_option", "budget_option", "image_options", "kernel_options", "output_options"]

Verb = TypeVar("Verb", bound=Callable[..., Any])


def output_options(verb: Verb) -> Verb:
    """`--json` and `--color`, as `as_json` and `color`."""
    verb = click.option(
        "--color",
        type=click.Choice(COLORS),
        default="auto",
        help="Colour the text: auto is on a terminal, unless NO_COLOR is set.",
    )(verb)
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")(
        verb
    )


def att_option(verb: Verb) -> Verb:
    """`--att`."""
    return click.option("--att", is_flag=True, help="Disassemble in AT&T syntax instead of Intel's.")(verb)


def kernel_options(verb: Verb) -> Verb:
    """`image_options`, `--system-map` and `--module`, as `system_map` and `modules`."""
    verb = click.option(
        "--system-map",
        type=locate,
        metavar="FILE",
        help="Take the symbols of a linked image from this System.map, not from its kallsyms.",
    )(verb)
    verb = click.option(
        "--module",
        "modules",
        type=locate,
        multiple=True,
        metavar="KO",
        help="Load a module first; may be repeated.",
    )(verb)
    return image_options(verb)


def image_options(verb: Verb) -> Verb:
    """`--kernel`, `--handler` and `--cpu`, as `kernel`, `handler` and `cpu`."""
    verb = click.option(
        "--handler",
        type=click.Choice(HANDLERS),
        help="Whose code redirects calls: the image's own (the default if it has some) or klpemu's.",
    )(verb)
    verb = click.option(
        "--cpu",
        type=click.Choice([*CPUS]),
        default=DEFAULT_CPU,
        show_default=True,
        help="The kind of CPU that alternatives, returns and retpolines are applied for.",
    )(verb)
    return click.option(
        "--kernel",
        type=locate,
        metavar="IMAGE",
        help="The kernel image (vmlinuz, vmlinux or a relocatable object); the built-in one by default.",
    )(verb)


def budget_option(verb: Verb) -> Verb:
    """`--budget`, None if it is not given."""
    return click.option(
        "--budget",
        type=click.IntRange(min=1),
        metavar="N",
        help="Stop a guest call after N instructions as endless.",
    )(verb)
