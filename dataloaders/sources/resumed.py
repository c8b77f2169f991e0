"""Keep the data set of a resumed run as it was, although a manifest has since called some of its images broken.

The order of images is a function of their number, so leaving some out would give every later step other images. The
images that a manifest calls broken keep their numbers instead, and others are shown in their place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from mirl.dataloaders.errors import KnownBroken
from mirl.dataloaders.sources.base import Source

_log = logging.getLogger(__name__)


class WithKnownBroken:
    """This source has items that are known to be broken: they have a number and a name, and are never read."""

    def __init__(self, source: Source, broken: frozenset[int]) -> None:
        self.source, self.broken = source, broken
        self.num_images, self.classes, self.ledger = source.num_images, source.classes, source.ledger

    def path(self, index: int) -> str:
        return self.source.path(index)

    def read(self, index: int) -> bytes:
        if index in self.broken:
            raise KnownBroken("its manifest calls it broken")
        return self.source.read(index)

    def label(self, index: int) -> int:
        return self.source.label(index)

    def fingerprint(self) -> str:
        return self.source.fingerprint()

    def close(self) -> None:
        self.source.close()


def identity(source: Source) -> str:
    """Return what a checkpoint keeps of a data set: the number of its images and a digest of their names in order."""
    return f"{source.num_images}-{source.fingerprint()}"


def as_before(source: Source, open_all: Callable[[], Source], wanted: str) -> Source:
    """Return `source`, or the data with the images that its manifest leaves out if only that is the data set `wanted`.

    open_all: opens the same data with all images of the manifest. wanted: `identity` in the checkpoint.
    """
    if identity(source) == wanted:
        return source
    whole = open_all()
    if identity(whole) != wanted:
        whole.close()
        return source  # the loader refuses it and says what differs
    broken, at = set(), 0
    for index in range(whole.num_images):
        if at < source.num_images and whole.path(index) == source.path(at):
            at += 1
        else:
            broken.add(index)
    source.close()
    _log.warning(
        "%d of %d images, called broken by the manifest, keep their places in the order of the resumed run; others are "
        "shown instead", len(broken), whole.num_images,
    )  # fmt: skip
    return WithKnownBroken(whole, frozenset(broken))
