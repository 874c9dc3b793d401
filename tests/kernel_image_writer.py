"""Writes bzImages and kallsyms tables as the kernel's build does, for tests of their readers."""

import string
from collections.abc import Iterable, Sequence
from struct import pack, pack_into

# One more than the setup header says, since the boot sector is not counted.
SETUP_SECTORS = 2
SECTOR = 512
RODATA = 0xFFFF_FFFF_8200_0000
TEXT = 0xFFFF_FFFF_8100_0000
RELEASE = "6.1.0-test-amd64"

Row = tuple[str, str, int]


def bzimage(
    payload: bytes, *, protocol: int = 0x20F, xloadflags: int = 0x7F, length: int | None = None
) -> bytes:
    """A bzImage with `payload`, the size at its end included, 16 bytes into its protected-mode code."""
    setup = bytearray(SETUP_SECTORS * SECTOR)
    setup[0x1F1] = SETUP_SECTORS - 1
    setup[0x1FE:0x200] = b"\x55\xaa"
    setup[0x202:0x206] = b"HdrS"
    pack_into("<H", setup, 0x206, protocol)
    pack_into("<H", setup, 0x20E, 0x280 - 0x200)
    pack_into("<H", setup, 0x236, xloadflags)
    pack_into("<II", setup, 0x248, 16, len(payload) if length is None else length)
    text = f"{RELEASE} (someone@somewhere) #1 SMP".encode() + b"\0"
    setup[0x280 : 0x280 + len(text)] = text
    return bytes(setup) + bytes(16) + payload + b"what comes after the payload"


def with_size(compressed: bytes, data: bytes) -> bytes:
    """What cmd_file_size of scripts/Makefile.lib makes of it: the size of `data` at the end."""
    return compressed + pack("<I", len(data))


def kallsyms(
    rows: Sequence[Row],
    *,
    before: bytes = b"",
    with_seqs: bool = True,
    offsets_last: bool = False,
    absolute: bool = False,
    percpu: bool = True,
) -> bytes:
    """The tables of scripts/kallsyms.c for `rows`, which are (name, type, address) by address."""

    def aligned(data: bytes) -> bytes:
        return data + bytes(-len(data) % 8)

    tokens = token_table(name for name, _, _ in rows)
    names, markers = bytearray(), bytearray()
    for index, (name, type_, _) in enumerate(rows):
        if index % 256 == 0:
            markers += pack("<I", len(names))
        text = compressed(type_ + name, tokens)
        size = len(text)
        length = bytes([size]) if size < 0x80 else bytes([size & 0x7F | 0x80, size >> 7])
        names += length + text
    base = min((address for _, _, address in rows if address >= TEXT), default=TEXT)
    if absolute:
        places = b"".join(pack("<Q", address) for _, _, address in rows)
    elif percpu:
        places = b"".join(pack("<i", a if a < TEXT else base - 1 - a) for _, _, a in rows)
    else:
        places = b"".join(pack("<I", address - base) for _, _, address in rows)
    places = aligned(places) + (b"" if absolute else pack("<Q", base))
    by_name = sorted(range(len(rows)), key=lambda index: rows[index][0])
    seqs = b"".join(index.to_bytes(3, "big") for index in by_name)
    index, at = b"", 0
    for token in tokens:
        index += pack("<H", at)
        at += len(token) + 1
    parts = [pack("<I", len(rows)), bytes(names), bytes(markers)]
    if with_seqs and not offsets_last:
        parts.append(seqs)
    parts += [b"".join(token + b"\0" for token in tokens), index]
    parts = [*parts, places, seqs] if offsets_last else [places, *parts]
    return aligned(before) + b"".join(map(aligned, parts))


def token_table(names: Iterable[str]) -> list[bytes]:
    """Each character that may stand in a name as itself; the other bytes stand for frequent pairs."""
    pairs: dict[bytes, int] = {}
    for name in names:
        for at in range(len(name) - 1):
            pair = name[at : at + 2].encode()
            pairs[pair] = pairs.get(pair, 0) + 1
    frequent = iter(sorted(pairs, key=lambda pair: (-pairs[pair], pair)))
    kept = {*map(ord, string.ascii_letters + string.digits + "_.$?-")}
    return [bytes([code]) if code in kept else next(frequent, b"") for code in range(256)]


def compressed(text: str, tokens: Sequence[bytes]) -> bytes:
    """`text` in tokens, pairs where there are any."""
    codes = {token: code for code, token in enumerate(tokens) if token}
    data, out = text.encode(), bytearray()
    while data:
        pair = data[:2]
        length = 2 if len(pair) == 2 and pair in codes else 1
        out.append(codes[data[:length]])
        data = data[length:]
    return bytes(out)
