"""/dev/kmsg: user space reads the kernel's log there, a record a read, and writes lines of its own into it.

kernel/printk/printk.c.  Two things are otherwise: a reader who has seen all gets the end of the file (or
EAGAIN) instead of waiting for more, and writers are not limited in how much they write.
"""

import errno
import re
from typing import Final

from emu.errno import KernelErrno
from emu.printk import MESSAGE_LOGLEVEL_DEFAULT, Printk

__all__ = ["KMSG", "Kmsg"]

KMSG: Final = "/dev/kmsg"
LOG_LINE_MAX: Final = 1024 - 32
LOG_USER: Final = 1
_PREFIX: Final = re.compile(r"<(\d+)>")


class Kmsg:
    """One open /dev/kmsg."""

    def __init__(self, log: Printk, *, nonblocking: bool = False) -> None:
        self._log = log
        self._nonblocking = nonblocking
        self._seq = 0

    def read(self, size: int, _offset: int) -> bytes:
        """The next record, EINVAL if `size` bytes do not hold it."""
        if self._seq >= len(self._log.lines):
            if self._nonblocking:
                raise KernelErrno(errno.EAGAIN, "no more records", where=KMSG)
            return b""
        stamp = self._log.stamps[self._seq]
        text = "".join(
            _escaped(each) for each in self._log.lines[self._seq].encode("utf-8", "surrogateescape")
        )
        record = f"{stamp.priority},{self._seq},{stamp.nanoseconds // 1000},-;{text}\n".encode()
        self._seq += 1
        if len(record) > size:
            raise KernelErrno(errno.EINVAL, f"the record has {len(record)} bytes", where=KMSG)
        return record

    def write(self, data: bytes) -> int:
        """Append a line; `<N>` in front of it is its priority.  EINVAL if it is longer than 992 bytes."""
        if len(data) > LOG_LINE_MAX:
            raise KernelErrno(errno.EINVAL, f"{len(data)} bytes are too many for a line", where=KMSG)
        text = data.partition(b"\0")[0].decode("utf-8", "surrogateescape")
        level, facility = MESSAGE_LOGLEVEL_DEFAULT, LOG_USER
        if prefix := _PREFIX.match(text):
            level, facility = int(prefix[1]) & 7, (int(prefix[1]) & 0xFFFF_FFFF) >> 3 or LOG_USER
            text = text[prefix.end() :]
        self._log.devkmsg_emit(facility << 3 | level, text)
        return len(data)

    def close(self) -> None:
        """The file is no longer open."""


def _escaped(byte: int) -> str:
    return chr(byte) if 32 <= byte < 127 and byte != ord("\\") else f"\\x{byte:02x}"
