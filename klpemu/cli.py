"""The command line: `klpemu <verb>`.

Exit status of every verb: 0 all holds, 1 there are findings, 2 bad usage or bad input.  Errors are one line
on standard error, `klpemu: <error>`; only a failing guest adds its registers and last instructions.  Beyond
those there are 130 after Ctrl-C, 141 when the reader of a pipe has gone (as a shell reports SIGINT and
SIGPIPE), and 70 if klpemu itself is at fault.
"""

import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

import click

from elf.errors import KlpemuError
from emu.traps import GuestFault
from klpemu.interrupt import INTERRUPTED, say_interrupted, watch_for_ctrl_c
from klpemu.output import print_error
from klpemu.report import FINDINGS
from klpemu.verbs.boot import boot
from klpemu.verbs.demo import demo
from klpemu.verbs.explore import explore_
from klpemu.verbs.fuzz import fuzz
from klpemu.verbs.info import info
from klpemu.verbs.museum import museum
from klpemu.verbs.replay import replay
from klpemu.verbs.run import run
from klpemu.verbs.sites import sites
from klpemu.verbs.trace import trace
from klpemu.verbs.verify import verify

__all__ = ["main"]

BAD_INPUT: Final = 2
INTERNAL_ERROR: Final = 70
PIPE_CLOSED: Final = 141


class _Verbs(click.Group):
    """A group that ends with our exit statuses and our one line of error instead of click's."""

    def main(
        self, args: Sequence[str] | None = None, prog_name: str | None = None, *_: Any, **extra: Any
    ) -> Any:
        """Run the command line `args` and exit."""
        if "_KLPEMU_COMPLETE" in os.environ:  # the shell asks for completions
            return super().main(args, prog_name)
        if args is None:
            watch_for_ctrl_c()
        arguments = list(sys.argv[1:] if args is None else args)
        extra.pop("standalone_mode", None)
        sys.exit(_status_of(lambda: self._perform(arguments, extra)))

    def _perform(self, arguments: list[str], extra: dict[str, Any]) -> None:
        with self.make_context("klpemu", arguments, **extra) as context:
            self.invoke(context)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs in the order in which one gets to know them."""
        return list(self.commands)


def _status_of(body: Callable[[], object]) -> int:
    """Run `body` and return the exit status; errors are printed."""
    try:
        try:
            body()
        finally:
            sys.stdout.flush()
    except SystemExit as exit_:
        return int(exit_.code or 0)
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "klpemu"
        print_error(KlpemuError(error.format_message().rstrip("."), advice=f"see {command} --help"))
    except GuestFault as fault:
        print_error(fault)
        return FINDINGS
    except KlpemuError as error:
        print_error(error)
    except (KeyboardInterrupt, click.Abort):
        say_interrupted()
        return INTERRUPTED
    except BrokenPipeError:
        _forget_stdout()
        return PIPE_CLOSED
    except OSError as error:
        print_error(KlpemuError(error.strerror or str(error), where=str(error.filename or "")))
    except Exception as error:
        if os.environ.get("KLPEMU_TRACEBACK"):
            raise
        print_error(
            KlpemuError(
                f"internal error: {type(error).__name__}: {error}",
                advice="this is a defect of klpemu, please report it; KLPEMU_TRACEBACK=1 shows where it is",
            )
        )
        return INTERNAL_ERROR
    return BAD_INPUT


def _forget_stdout() -> None:
    """Nobody reads standard output any more: let the interpreter's last flush go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _version() -> str:
    try:
        return version("klpemu")
    except PackageNotFoundError:
        return "not installed"


@click.group(cls=_Verbs, invoke_without_command=True)
@click.version_option(_version(), prog_name="klpemu")
@click.pass_context
def main(context: click.Context) -> None:
    """A machine-code-true emulator of Linux kernel live patching.

    Begin with `klpemu demo`.  Wherever a file is named, builtin:NAME names one that comes with klpemu.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        context.exit(BAD_INPUT)


for _verb in (demo, sites, info, verify, trace, run, boot, replay, museum, fuzz, explore_):
    main.add_command(_verb)
