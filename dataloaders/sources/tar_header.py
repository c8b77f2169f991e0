"""Check the 512 bytes before a member's data: are they the header of the member that an index names?"""

from __future__ import annotations

BLOCK = 512
_NOT_ASCII = bytes(range(128, 256)) + b"?_"


def header_matches(header: bytes, name: bytes, size: int) -> bool:
    """Say whether a tar header belongs to member `name` with `size` bytes of data.

    Long names are kept elsewhere and the header holds their beginning (GNU, pax) or their end (ustar prefix). A name
    that is not ASCII stands in a pax header as the writer made it: with question marks (Python), as raw bytes (GNU
    tar), or not at all. So only the ASCII characters of such a name are compared.
    """
    if not _sum_is_right(header) or _number(header[124:136]) != size:
        return False
    short = header[:100].rstrip(b"\0")
    if _is_part(short, name):
        return bool(short)
    return not name.isascii() and _is_part(short.translate(None, _NOT_ASCII), name.translate(None, _NOT_ASCII))


def is_header(block: bytes) -> bool:
    """Say whether 512 bytes are the header of a tar member: it has a name and the right sum."""
    return block[0] > 0 and _sum_is_right(block)


def _is_part(short: bytes, name: bytes) -> bool:
    return name.startswith(short) or name.endswith(short)


def _sum_is_right(header: bytes) -> bool:
    field = header[148:156]
    signed = sum(header) - sum(field) + 8 * 0x20
    return _number(field) in (signed, signed - 256 * sum(byte > 127 for byte in header[:148] + header[156:]))


def _number(field: bytes) -> int:
    """Read a number of a tar header, octal or, above 8 GiB, base 256; -1 if it is none."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b"\0 ")
    try:
        return int(digits, 8)
    except ValueError:
        return -1
