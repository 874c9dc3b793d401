"""Files of /proc that a function of the kernel prints: fs/proc/cmdline.c, fs/proc/meminfo.c.

Reading one runs the image's own function in the guest, patched or not.
"""

from functools import partial
from typing import TYPE_CHECKING, Final

from emu.memory import read_u64
from emu.seq_file import single_open_read

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = ["proc_create_single"]

COMMAND_LINE: Final = b"BOOT_IMAGE=/boot/vmlinuz root=/dev/ram0 ro quiet"
# What proc_create_single() names, as far as the image has it.
SINGLE: Final = {"cmdline": "cmdline_proc_show", "meminfo": "meminfo_proc_show"}


def setup_command_line(machine: "Machine") -> None:
    """What start_kernel() does with the command line: the one given, or one for an image that has none yet
    (init/main.c).
    """
    at = machine.vmlinux.symbols.get("saved_command_line")
    if at is not None and (machine.command_line or not read_u64(machine.space, at)):
        line = machine.command_line.encode("utf-8", "surrogateescape") or COMMAND_LINE
        text = machine.slab.kzalloc(len(line) + 1, "saved_command_line")
        machine.space.write(text, line)
        machine.space.write(at, text.to_bytes(8, "little"))


def proc_create_single(machine: "Machine") -> None:
    """Make the files in /proc, which is there."""
    setup_command_line(machine)
    for name, show in SINGLE.items():
        address = machine.vmlinux.symbols.get(show)
        if address is not None:
            machine.kernfs.create_file(
                f"/proc/{name}", 0o444, show=partial(single_open_read, machine, address)
            )
