"""Options that several verbs have."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from klpemu.fixtures import locate
from klpemu.output import COLORS

__all__ = ["att_option", "budget_option", "kernel_options", "output_options"]

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
    """`--kernel` and `--module`, as `kernel` and `modules`."""
    verb = click.option(
        "--module",
        "modules",
        type=locate,
        multiple=True,
        metavar="KO",
        help="Load a module first; may be repeated.",
    )(verb)
    return click.option(
        "--kernel",
        type=locate,
        metavar="IMAGE",
        help="The kernel image; the built-in one by default.",
    )(verb)


def budget_option(verb: Verb) -> Verb:
    """`--budget`, None if it is not given."""
    return click.option(
        "--budget",
        type=click.IntRange(min=1),
        metavar="N",
        help="Stop a guest call after N instructions as endless.",
    )(verb)
