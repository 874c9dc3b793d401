"""The kernel's error numbers as exceptions: a service raises what its C counterpart returns."""

import errno

from elf.errors import KlpemuError

__all__ = ["KernelErrno", "errno_name"]


class KernelErrno(KlpemuError):  # noqa: N818
    """A kernel function returned an error; `number` is positive, `name` is `EBUSY`, `EINVAL`, …

    `reason` is what was found, without the errno's name behind it.
    """

    def __init__(self, number: int, what: str, *, where: str = "", advice: str = "") -> None:
        self.number = number
        self.name = errno_name(number)
        self.reason = what
        super().__init__(f"{what} (-{self.name})", where=where, advice=advice)


def errno_name(number: int) -> str:
    """`EBUSY` for 16."""
    return errno.errorcode.get(number, f"E{number}")
