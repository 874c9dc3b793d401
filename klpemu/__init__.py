"""A machine-code-true emulator of Linux kernel live patching."""

from elf.errors import KlpemuError
from emu.errno import KernelErrno
from emu.traps import GuestFault
from klpemu.kernel import Kernel, Trace
from patches.invariants.finding import Finding, Findings, Report
from patches.livepatch import Func, Patch

__all__ = [
    "Finding",
    "Findings",
    "Func",
    "GuestFault",
    "Kernel",
    "KernelErrno",
    "KlpemuError",
    "Patch",
    "Report",
    "Trace",
]
