"""Re-encode one image, and do the two units of work of `prepare_data`: one file, one shard."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from mirl.dataloaders.decoding.headers import decode_with_pillow, read_header
from mirl.dataloaders.errors import ImageError, one_line
from mirl.dataloaders.sources.base import Source
from mirl.dataloaders.sources.manifest import atomic_writer


@dataclass(frozen=True)
class Encoder:
    """An encoder turns any encoded picture into the JPEG of the copy."""

    short_side: int
    quality: int

    def __call__(self, data: bytes) -> bytes:
        """Encode a picture. ImageError if it is broken."""
        header = read_header(data)
        small = min(header.height, header.width) <= self.short_side
        if small and header.format == "JPEG" and _is_plain_rgb(data):
            decode_with_pillow(data)
            return data
        try:
            with Image.open(io.BytesIO(data)) as image:
                # libjpeg may leave out detail that would only be averaged away, down to twice the size that is needed.
                factor = 2 * self.short_side / min(image.size)
                if factor < 1:
                    image.draft("RGB", (int(image.width * factor), int(image.height * factor)))
                upright = ImageOps.exif_transpose(image)
                width, height = shrunk_size(header.width, header.height, self.short_side)
                small_image = upright.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        except Exception as error:  # Pillow's plug-ins raise almost anything on damaged files
            raise ImageError(one_line(error)) from error
        buffer = io.BytesIO()
        small_image.save(buffer, "JPEG", quality=self.quality, subsampling="4:2:0", optimize=True)
        return buffer.getvalue()


@dataclass
class Done:
    """A task returns these counts of what it did."""

    written: int = 0
    kept: int = 0
    bytes: int = 0
    broken: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class FileTask:
    """This task writes one image to one file. An image is broken if `label` cannot give its class, as in a shard."""

    source: Source
    index: int
    target: Path
    label: Callable[[int], int] | None

    def run(self, encode: Encoder) -> Done:
        if self.target.exists():
            return Done(kept=1)
        try:
            data = encode(self.source.read(self.index))
            if self.label is not None:
                self.label(self.index)
        except ImageError as error:
            return Done(broken=[(self.source.path(self.index), str(error))])
        with atomic_writer(self.target, "wb") as file:
            file.write(data)
        return Done(written=1, bytes=len(data))


@dataclass(frozen=True)
class ShardTask:
    """This task writes a range of images to one tar shard, with class numbers if there is a `label`."""

    source: Source
    first: int
    end: int
    target: Path
    label: Callable[[int], int] | None

    def run(self, encode: Encoder) -> Done:
        if self.target.exists():
            return Done(kept=self.end - self.first)
        done, broken = Done(), []
        with atomic_writer(self.target, "wb") as file, tarfile.open(fileobj=file, mode="w") as tar:
            for index in range(self.first, self.end):
                path = self.source.path(index)
                try:
                    data = encode(self.source.read(index))
                    number = None if self.label is None else self.label(index)
                except ImageError as error:
                    broken.append((path, str(error)))
                    continue
                # WebDataset ends the key at the first dot; 70 characters fit the plain tar header.
                stem = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(path.partition("::")[2] or path).stem)[:70]
                key = f"{index:09d}-{stem}"
                _add(tar, f"{key}.jpg", data)
                if number is not None:
                    _add(tar, f"{key}.cls", str(number).encode())
                done.written += 1
                done.bytes += len(data)
        done.broken = broken
        return done


def shrunk_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Return (width, height) with the shorter side at most short_side, never enlarged."""
    factor = min(1.0, short_side / min(width, height))
    return max(1, round(width * factor)), max(1, round(height * factor))


def _is_plain_rgb(data: bytes) -> bool:
    with Image.open(io.BytesIO(data)) as image:
        return image.mode == "RGB" and image.getexif().get(0x0112, 1) == 1


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
