"""What user space finds mounted, and the files of it that the machine itself answers.

/sys with /sys/kernel (kernel/ksysfs.c), debugfs with dynamic debug, tracefs with `enabled_functions`, and
/proc with the sysctl kernel.ftrace_enabled (kernel/trace/ftrace.c).  Modules and livepatch add theirs.
"""

import errno
import re
from typing import TYPE_CHECKING, Any, Final

from emu import dynamic_debug
from emu.errno import KernelErrno
from emu.kernfs import DEBUGFS, PROCFS, SYSCTL, SYSFS, TRACEFS
from emu.kobject import kobject_create_and_add
from emu.proc import proc_create_single

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = ["mount_filesystems", "proc_dointvec"]

# Numbers as proc_get_long() takes them: any base that C has, up to the white space behind.
_NUMBER: Final = re.compile(r"\s*(-?)(0[xX][0-9a-fA-F]+|[0-9]+)(?:[ \t\n\0]|$)")
INT_MAX = (1 << 31) - 1


def mount_filesystems(machine: "Machine") -> tuple[Any, Any]:
    """Make the tree as it is after boot.

    Returns the views of the kobjects whose directories are /sys/kernel (kernel_kobj) and /sys/module (that of
    module_kset).
    """
    kernfs = machine.kernfs
    kernfs.mount("/sys", SYSFS)
    kernel_kobj = kobject_create_and_add(machine, "kernel", None)
    module_kobj = kobject_create_and_add(machine, "module", None)
    kernfs.mount("/sys/kernel/debug", DEBUGFS)
    kernfs.create_dir(dynamic_debug.CONTROL.rpartition("/")[0])
    control = machine.log.dynamic_debug
    kernfs.create_file(dynamic_debug.CONTROL, 0o644, show=control.show, store=control.store)
    for tracefs in ("/sys/kernel/debug/tracing", "/sys/kernel/tracing"):
        kernfs.mount(tracefs, TRACEFS)
        kernfs.create_file(f"{tracefs}/enabled_functions", 0o444, show=lambda: _enabled_functions(machine))
    kernfs.mount("/proc", PROCFS)
    proc_create_single(machine)
    kernfs.mount("/proc/sys", SYSCTL)
    kernfs.create_dir("/proc/sys/kernel")
    kernfs.create_file(
        "/proc/sys/kernel/ftrace_enabled",
        0o644,
        show=lambda: f"{machine.ftrace.ftrace_enabled()}\n",
        store=lambda text: machine.ftrace.ftrace_enable_sysctl(proc_dointvec(text)),
    )
    return kernel_kobj, module_kobj


def proc_dointvec(text: str) -> int:
    """The number that is written to a sysctl of one int (kernel/sysctl.c); EINVAL if there is none.

    What stands behind the first number is left alone.
    """
    found = _NUMBER.match(text)
    if found is None:
        raise KernelErrno(errno.EINVAL, f"'{text.strip()}' is no number")
    digits = found[2]
    octal = digits.startswith("0") and digits.isdigit()
    try:
        number = int(digits, 8 if octal else 0)
    except ValueError:
        raise KernelErrno(errno.EINVAL, f"'{digits}' is no octal number") from None
    if number > INT_MAX + bool(found[1]):
        raise KernelErrno(errno.EINVAL, f"{found[1]}{digits} does not fit an int")
    return -number if found[1] else number


def _enabled_functions(machine: "Machine") -> str:
    return "".join(f"{line}\n" for line in machine.ftrace.enabled_functions())
