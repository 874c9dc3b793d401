"""What the kernel's own meminfo_proc_show() asks of parts of the kernel that are not there.

There is no block layer and no huge page pool; the numbers of pages are those of an idle machine.
"""

from typing import TYPE_CHECKING

from emu.exports import export

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = ["nr_blockdev_pages"]


@export
def nr_blockdev_pages(machine: "Machine") -> int:
    """No block device: no page caches of them."""
    del machine
    return 0
