"""`klpemu boot`: a kernel as files, for scripts that were written for a real machine."""

import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import click

from klpemu.booted import booted
from klpemu.interrupt import signals
from klpemu.mount import Mount
from klpemu.mount_namespace import start
from klpemu.verbs.options import image_options

__all__ = ["boot"]

SIGNALLED = 128  # and the signal's number, as a shell reports it


@click.command(short_help="Mount a kernel as files, and run shell scripts on it.")
@image_options
@click.option(
    "--modules",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    multiple=True,
    metavar="DIR",
    help="Where modprobe finds modules; may be repeated.",
)
@click.option(
    "--mount",
    "mountpoint",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The empty directory to mount it on; with a command a temporary one by default.",
)
@click.option("--cpus", type=click.IntRange(1, 64), default=1, show_default=True, help="Number of vCPUs.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[-- COMMAND [ARG]...]")
def boot(
    kernel: Path | None,
    handler: str | None,
    cpu: str,
    modules: tuple[Path, ...],
    mountpoint: Path | None,
    cpus: int,
    command: tuple[str, ...],
) -> None:
    """Boot a kernel and show it as files: DIR/sys, DIR/proc, DIR/dev/kmsg.

    DIR/klpemu/bin has modprobe, rmmod, insmod, modinfo, lsmod, dmesg, sysctl and uname for it.  Virtual time
    moves only when something is asked for: by at most 100 milliseconds before each request.  Ctrl-C unmounts.

    With a command, that is run in a mount namespace in which these files and commands stand where a real
    machine has its own; needs root.

    Exit status: the command's, or 0.
    """
    if mountpoint is None and not command:
        raise click.UsageError("name a directory with --mount, or a command")
    with _directory(mountpoint) as directory:
        mount = booted(directory, kernel, modules=modules, cpus=cpus, handler=handler, cpu=cpu)
        status = _run(mount, command) if command else _serve(mount)
    sys.exit(status)


@contextmanager
def _directory(given: Path | None) -> Iterator[Path]:
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="klpemu-") as made:
        yield Path(made)


def _serve(mount: Mount) -> int:
    """Show the files until somebody unmounts them, or a signal comes."""
    with suppress(_Stop), signals(_stop), mount:
        click.echo(f"mounted on {mount.mountpoint}; Ctrl-C ends it")
        mount.wait()
    return 0


def _run(mount: Mount, command: tuple[str, ...]) -> int:
    """Run a command on the files; Ctrl-C is the command's, it gets it from the terminal."""
    process: subprocess.Popen[bytes] | None = None

    def forward(number: int, _frame: FrameType | None) -> None:
        if process is None:
            raise _Stop(number)
        if number != signal.SIGINT:
            process.send_signal(number)

    try:
        with signals(forward), mount:
            process = start(command, mount.mountpoint)
            status = process.wait()
    except _Stop as stop:
        return SIGNALLED + int(stop.args[0])
    return SIGNALLED - status if status < 0 else status


class _Stop(Exception):  # noqa: N818  (not an error)
    """A signal that ends us came."""


def _stop(number: int, _frame: FrameType | None) -> None:
    raise _Stop(number)
