"""The names of allocation flags: include/linux/gfp_types.h, include/trace/events/mmflags.h."""

from typing import Final

__all__ = ["GFP_ZERO", "gfp_flags"]

DMA, HIGHMEM, DMA32, MOVABLE, RECLAIMABLE, HIGH, IO, FS, GFP_ZERO, ATOMIC = (1 << bit for bit in range(10))
DIRECT_RECLAIM, KSWAPD_RECLAIM, WRITE, NOWARN, RETRY_MAYFAIL, NOFAIL = (1 << bit for bit in range(10, 16))
NORETRY, MEMALLOC, COMP, NOMEMALLOC, HARDWALL, THISNODE, ACCOUNT, ZEROTAGS = (
    1 << bit for bit in range(16, 24)
)
RECLAIM = DIRECT_RECLAIM | KSWAPD_RECLAIM
GFP_KERNEL = RECLAIM | IO | FS
GFP_USER = GFP_KERNEL | HARDWALL
GFP_HIGHUSER = GFP_USER | HIGHMEM
GFP_TRANSHUGE_LIGHT = (GFP_HIGHUSER | MOVABLE | COMP | NOMEMALLOC | NOWARN) & ~RECLAIM

# In this order: who comes first takes its bits away from those behind it.
NAMES: Final = (
    ("GFP_TRANSHUGE", GFP_TRANSHUGE_LIGHT | DIRECT_RECLAIM),
    ("GFP_TRANSHUGE_LIGHT", GFP_TRANSHUGE_LIGHT),
    ("GFP_HIGHUSER_MOVABLE", GFP_HIGHUSER | MOVABLE),
    ("GFP_HIGHUSER", GFP_HIGHUSER),
    ("GFP_USER", GFP_USER),
    ("GFP_KERNEL_ACCOUNT", GFP_KERNEL | ACCOUNT),
    ("GFP_KERNEL", GFP_KERNEL),
    ("GFP_NOFS", RECLAIM | IO),
    ("GFP_ATOMIC", HIGH | ATOMIC | KSWAPD_RECLAIM),
    ("GFP_NOIO", RECLAIM),
    ("GFP_NOWAIT", KSWAPD_RECLAIM),
    ("GFP_DMA", DMA),
    ("__GFP_HIGHMEM", HIGHMEM),
    ("GFP_DMA32", DMA32),
    ("__GFP_HIGH", HIGH),
    ("__GFP_ATOMIC", ATOMIC),
    ("__GFP_IO", IO),
    ("__GFP_FS", FS),
    ("__GFP_NOWARN", NOWARN),
    ("__GFP_RETRY_MAYFAIL", RETRY_MAYFAIL),
    ("__GFP_NOFAIL", NOFAIL),
    ("__GFP_NORETRY", NORETRY),
    ("__GFP_COMP", COMP),
    ("__GFP_ZERO", GFP_ZERO),
    ("__GFP_NOMEMALLOC", NOMEMALLOC),
    ("__GFP_MEMALLOC", MEMALLOC),
    ("__GFP_HARDWALL", HARDWALL),
    ("__GFP_THISNODE", THISNODE),
    ("__GFP_RECLAIMABLE", RECLAIMABLE),
    ("__GFP_MOVABLE", MOVABLE),
    ("__GFP_ACCOUNT", ACCOUNT),
    ("__GFP_WRITE", WRITE),
    ("__GFP_RECLAIM", RECLAIM),
    ("__GFP_DIRECT_RECLAIM", DIRECT_RECLAIM),
    ("__GFP_KSWAPD_RECLAIM", KSWAPD_RECLAIM),
    ("__GFP_ZEROTAGS", ZEROTAGS),
)


def gfp_flags(flags: int) -> str:
    """What `%pGg` prints for a gfp_t; bits without a name come last, as a number."""
    found = []
    for name, bits in NAMES:
        if flags & bits == bits:
            found.append(name)
            flags &= ~bits
    if flags:
        found.append(f"{flags:#x}")
    return "|".join(found)
