"""Members of tar shards, written one by one."""

from __future__ import annotations

import io
import tarfile

from PIL import Image


def add_member(shard: tarfile.TarFile, name: str, content: bytes | Image.Image, fmt: str = "PNG") -> None:
    """Write ``content`` to ``shard`` as a file called ``name``; a picture is encoded as ``fmt``."""
    if isinstance(content, Image.Image):
        encoded = io.BytesIO()
        content.save(encoded, fmt)
        content = encoded.getvalue()
    member = tarfile.TarInfo(name)
    member.size = len(content)
    shard.addfile(member, io.BytesIO(content))
