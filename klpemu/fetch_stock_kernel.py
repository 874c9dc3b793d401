"""The stock kernel and its livepatch modules, put into the cache: `python -m klpemu.fetch_stock_kernel`.

It is not part of klpemu/stock_kernel.py because the package imports that.
"""

import sys

from elf.errors import KlpemuError
from klpemu.stock_kernel import StockKernel, build_livepatch_modules, fetch

__all__ = ["main"]


def main() -> int:
    """Fetch the kernel, build its livepatch modules, and print where they are.

    Returns 0, or 2 after one line of error.
    """

    def say(line: str) -> None:
        print(line, flush=True)

    try:
        kernel = fetch(say)
        build_livepatch_modules(kernel, say)
    except KlpemuError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = StockKernel(kernel.release, kernel.directory)
    built = len(found.livepatch.test_modules) + len(found.livepatch.samples)
    print(f"stock kernel {found.release} with {len(found.modules):,} modules: {found.directory}")
    print(f"{built} livepatch modules of its own: {found.livepatch.directory}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
