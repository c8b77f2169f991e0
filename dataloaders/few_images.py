"""Load a few images by path, for pictures of a model's work: one call, no threads left behind."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from mirl.dataloaders.decoding.arrays import ArrayFormat, as_resizable, check_statistics, detect_array_format, normalise
from mirl.dataloaders.decoding.crops import evaluation_windows
from mirl.dataloaders.decoding.dali_pipeline import DaliDecoder, DecodeJob
from mirl.dataloaders.decoding.headers import as_portable_pixmap, decode_with_pillow, read_header
from mirl.dataloaders.decoding.resize import CpuResizer
from mirl.dataloaders.errors import ImageError
from mirl.dataloaders.sources.base import read_whole_file
from mirl.dataloaders.sources.containers import Reading, container_of
from mirl.dataloaders.sources.member_source import MemberSource
from mirl.dataloaders.sources.paths import chosen_in, shard_of, url_of
from mirl.dataloaders.sources.remote import find_member, open_remote, shard_url
from mirl.dataloaders.sources.tar_source import read_member
from mirl.errors import UserError


def load_images(
    paths: Sequence[str | Path],
    *,
    image_size: tuple[int, int],
    channels: int = 3,
    resize_short: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    index_dir: str | Path | None = None,
) -> torch.Tensor:
    """Load a few images by path, resized and centre-cropped, on the CPU.

    Returns uint8 [B, H, W, C], or for 16-bit and float array files float32 [B, C, H, W], normalised.

    paths: files, or members as loaders name them (shard.tar::member). index_dir: the folder of the shards' indexes;
    default: beside the shards. resize_short: the shorter side before the crop; default: as small as covers image_size.
    UserError names the first file that cannot be used.
    """
    if not paths:
        raise ValueError("paths is empty; give at least one image")
    short = 1 if resize_short is None else resize_short
    names = [url_of(path) or str(path) for path in paths]
    files = [_read_named(name, index_dir) for name in names]
    array_format = _detect_format(files[0], names[0], channels)
    size = (image_size[0], image_size[1])
    resizer = CpuResizer(size, threads=1)
    try:
        if array_format is not None:
            check_statistics(channels, mean, std)
            whole = [_read_array(array_format, file, name) for file, name in zip(files, names, strict=True)]
            job = DecodeJob(whole, *evaluation_windows(np.array([array.shape[:2] for array in whole]), short, size))
            crops = [as_resizable(crop) for crop in job.cut()]
        else:
            job, crops = _decode(files, names, channels, short, size)
        images = resizer(crops, job.mirrored, job.sizes, job.offsets)
        return images if images.dtype == torch.uint8 else normalise(images, mean, std)
    finally:
        resizer.close()


def _detect_format(file: bytes, name: str, channels: int) -> ArrayFormat | None:
    try:
        return detect_array_format(file, name, channels)
    except ImageError as error:
        raise UserError(f"{name}: {error}; give another image") from None


def _decode(
    files: list[bytes], names: list[str], channels: int, short: int, size: tuple[int, int]
) -> tuple[DecodeJob, list[np.ndarray]]:
    """Decode pictures. Returns the job, which says how to resize, and the decoded windows, uint8 [h, w, C]."""
    encoded, sizes = [], []
    for file, name in zip(files, names, strict=True):
        try:
            header = read_header(file)
            native = file if header.native else as_portable_pixmap(decode_with_pillow(file, channels))
        except ImageError as error:
            raise UserError(f"{name}: {error}; give another image") from None
        encoded.append(np.frombuffer(native, np.uint8))
        sizes.append((header.height, header.width))
    job = DecodeJob(encoded, *evaluation_windows(np.array(sizes), short, size))

    def exchange(i: int) -> DecodeJob:
        try:
            pixels_HWC = decode_with_pillow(files[i], channels)
        except ImageError as error:
            raise UserError(f"{names[i]}: {error}; give another image") from None
        pixmap = np.frombuffer(as_portable_pixmap(pixels_HWC), np.uint8)
        return DecodeJob([pixmap], *evaluation_windows(np.array([pixels_HWC.shape[:2]]), short, size))

    decoder = DaliDecoder(
        batch_size=len(files), image_size=(1, 1), channels=channels, threads=1, device_id=None, depth=1
    )
    try:
        decoder.submit(job, exchange)
        decoded = decoder.collect()
        assert isinstance(decoded, list)
        return job, [np.array(pixels) for pixels in decoded]
    finally:
        decoder.close()


def _read_array(array_format: ArrayFormat, file: bytes, name: str) -> np.ndarray:
    try:
        return array_format.read(file)
    except ImageError as error:
        raise UserError(f"{name}: {error}; give another image") from None


def _read_named(name: str, index_dir: str | Path | None) -> bytes:
    try:
        if url_of(name) is not None:
            return _read_remote(name)
        shard = shard_of(name)
        file, key = chosen_in(name if shard is None else shard)
        if (kind := container_of(file)) is not None:
            return _read_held(file, kind, key, name)
        if shard is None:
            return read_whole_file(name)
        member = name[len(shard) + len("::") :]
        return read_member(Path(shard), member, None if index_dir is None else Path(index_dir))
    except ImageError as error:
        raise UserError(f"{name}: {error}; check the path") from None


def _read_remote(path: str) -> bytes:
    """Read one member of a remote shard, URL::member."""
    source = open_remote(shard_url(path))
    try:
        if (index := find_member(source, path)) is None:
            raise ImageError("the shard has no such member")
        return source.read(index)
    finally:
        source.close()


def _read_held(file: Path, kind: str, key: str, path: str) -> bytes:
    """Read the image ``path`` from a file that holds several. key: the choice among them."""
    source = MemberSource(file.parent, [file.name], kind, reading=Reading(key=key))
    try:
        index = source.find(path[len(os.fspath(file)) - len(file.name) :])
        if index is None:
            raise ImageError("the file has no such member")
        return source.read(index)
    finally:
        source.close()
