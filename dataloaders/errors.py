"""Define the exceptions for data that cannot be used, and the record that a loader keeps of a broken image."""

from __future__ import annotations

from dataclasses import dataclass

from mirl.errors import StorageLost as StorageLost


class ImageError(Exception):
    """One image cannot be used. The message is the reason alone, without the path, in one line."""


class KnownBroken(ImageError):
    """One image is called broken by the manifest of its data set; that is no news and is not counted."""


class StorageError(ImageError):
    """One image cannot be read for longer than a moment, because the file system fails."""


class TooManyBadImages(RuntimeError):
    """More distinct images broke in training than the limit allows; the message names files, limit and mend."""


@dataclass(frozen=True, kw_only=True)
class BadImage:
    """This record says that an image could not be used.

    epoch and position say where it would have been seen; replaced_by is the path of the image that was shown instead.
    """

    path: str
    reason: str
    epoch: int
    position: int
    replaced_by: str


def one_line(error: BaseException | str, limit: int = 200) -> str:
    """Put the text of an error on one line of at most `limit` characters: logs and manifests hold a line per image."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
