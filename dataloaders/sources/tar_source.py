"""Read images inside WebDataset tar shards, each by one positioned read with the help of the shard's index.

An index is checked twice to belong to its tar: when the source is opened, at the first, middle and last image and at
the end of the file; and at every read, which takes in the 512-byte tar header before the data.
"""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mirl.dataloaders.errors import ImageError, StorageError, StorageLost
from mirl.dataloaders.sources.class_names import CLASS_NAMES, class_names_beside
from mirl.dataloaders.sources.handles import POOL, TOO_MANY, mend_of_too_many
from mirl.dataloaders.sources.index_format import Part, ShardIndex
from mirl.dataloaders.sources.kinds import image_extensions
from mirl.dataloaders.sources.ledger import Ledger
from mirl.dataloaders.sources.paths import PathTable, shown
from mirl.dataloaders.sources.patience import patiently
from mirl.dataloaders.sources.tar_header import BLOCK, header_matches
from mirl.dataloaders.sources.tar_index import ambiguity, index_command, index_path, load_index, part_of
from mirl.dataloaders.sources.tar_members import TarMembers
from mirl.dataloaders.sources.tar_samples import AmbiguousSample, choose_images, is_image
from mirl.errors import UserError

_MOST_DIGITS = 9  # a class number has no more
_USUAL_END = 2**16  # tars end with zeros up to a multiple of 10 KiB


class TarSource:
    """This source has all images of some shards; labels come from the `cls` parts of their samples.

    dataloaders/sources/tar_samples.py chooses the image among a sample's parts. Handles are borrowed for each read.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        *,
        index_dir: Path | None = None,
        labels: bool = False,
        skip: frozenset[str] = frozenset(),
        only: frozenset[str] | None = None,
        every_name: bool = False,
        called: Sequence[str] | None = None,
    ) -> None:
        """Load the indexes. UserError if one is missing, damaged or not of its tar, or if no sample has an image.

        skip, only: paths (shard.tar::member) to leave out, or to keep. every_name: see `Ledger`. called: the shards'
        names in paths, if they are copies.
        """
        self.shards = [os.fspath(shard) for shard in shards]
        self.called = self.shards if called is None else list(called)
        self.classes = class_names_beside(shards) if labels else None
        unit = f"members of {len(self.shards)} tar shard{'s' if len(self.shards) > 1 else ''}"
        self.ledger = Ledger(unit, every_name=every_name)
        self._index_dir = index_dir

        sizes: list[int] = []
        label_parts: list[tuple[int, int]] = []
        offsets: list[int] = []
        counts: list[int] = []
        taken: Counter[str] = Counter()

        def names() -> Iterator[bytes]:
            for number, shard in enumerate(shards):
                before = len(offsets)
                for image, extension, label in self._images(number, shard):
                    path = f"{self.called[number]}::{image.name}" if skip or only is not None else ""
                    if skip and path in skip:
                        self.ledger.leave_out("broken by the manifest", path)
                        continue
                    if only is not None and path not in only:
                        self.ledger.leave_out("not called good by the manifest", path)
                        continue
                    offsets.append(image.offset)
                    sizes.append(image.size)
                    if labels:
                        label_parts.append(_label_part(image, label, self.called[number]))
                    taken[_field(extension)] += 1
                    yield image.raw_name
                counts.append(len(offsets) - before)

        self._names = PathTable("", names())
        self.num_images = self.ledger.images = len(self._names)
        self._offsets, self._sizes = np.asarray(offsets, np.int64), np.asarray(sizes, np.int64)
        self._label_parts = np.asarray(label_parts, np.int64).reshape(-1, 2) if labels else None
        self._first = np.cumsum([0, *counts])
        if set(taken) - {""}:
            parts = (f"{count} from part {name or 'without a name'}" for name, count in taken.most_common(4))
            self.ledger.notes.append(", ".join(parts))
        if not self.num_images:
            known = ", ".join(sorted(image_extensions()))
            raise UserError(
                f"no sample of {shown(self.called[0])} (or {len(shards) - 1} more shards) has an image: {known}; "
                f"{self.ledger}"
            )
        self._check()

    def _images(self, number: int, shard: Path) -> Iterator[tuple[Part, str, Part | None]]:
        """Give (part, extension, label's part) of every image of one shard; other members go into the ledger."""
        path = self.called[number]
        index = load_index(index_path(shard, self._index_dir), shard)
        if (unlisted := _unlisted_image(shard, index, self._tail(self.shards[number], index))) is not None:
            command = index_command(index_path(shard, self._index_dir), shard, "--force")
            raise UserError(
                f"index of {shown(shard)} does not match the tar: {shown(unlisted)} and what follows was added after "
                f"the index was made; run: {command}"
            )
        for name, reason in index.left_out:
            self.ledger.leave_out(reason, path, name)
        for parts in index.samples:
            try:
                chosen = choose_images(parts, index.image_part)
            except AmbiguousSample as error:
                raise UserError(ambiguity(shard, self._index_dir, error)) from None
            for part, reason in chosen.left_out:
                self.ledger.leave_out(reason, path, part.name)
            yield from chosen.images

    def _tail(self, path: str, index: ShardIndex) -> bytes:
        """Read the bytes behind the last member that the index names, as many as an end of a tar usually has."""
        return patiently(lambda: self._pread_once(path, _end_of(index), _USUAL_END), path)

    def path(self, index: int) -> str:
        return f"{self.called[self._shard(index)]}::{self._names.name(index)}"

    def read(self, index: int) -> bytes:
        shard, offset, size = self._shard(index), int(self._offsets[index]), int(self._sizes[index])
        try:
            block = self._pread(shard, offset - BLOCK, size + BLOCK)
        except OSError as error:
            raise ImageError(f"the tar cannot be read: {error.strerror}") from error
        if len(block) < size + BLOCK:
            raise ImageError("the tar ends before this sample does; it was cut after its index was made")
        if not header_matches(block[:BLOCK], self._names.raw(index), size):
            raise ImageError("the index does not match the tar; make it again with: mirl make-index --force")
        return block[BLOCK:]

    def label(self, index: int) -> int:
        if self._label_parts is None:
            raise ValueError("this data set was opened without labels; open it with labels=True")
        offset, size = self._label_parts[index]
        try:
            text = self._pread(self._shard(index), int(offset), int(size))
        except OSError as error:
            raise ImageError(f"its cls part cannot be read: {error.strerror}") from error
        if not (digits := text.strip()).isdigit() or len(digits) > _MOST_DIGITS:
            raise ImageError(f"its cls part is {text[:20]!r}, not a class number")
        number = int(digits)
        if self.classes is not None and not 0 <= number < len(self.classes):
            raise ImageError(f"its cls part is {number}, but {CLASS_NAMES} names {len(self.classes)} classes")
        return number

    def fingerprint(self) -> str:
        return self._names.digest()

    def close(self) -> None:
        for shard in self.shards:
            POOL.drop(shard)

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self._first, index, side="right")) - 1

    def _pread(self, shard: int, offset: int, size: int) -> bytes:
        path = self.shards[shard]
        # A handle may be stale: each new try opens the shard again.
        return patiently(lambda: self._pread_once(path, offset, size), path, afresh=lambda: POOL.drop(path))

    @staticmethod
    def _pread_once(path: str, offset: int, size: int) -> bytes:
        with POOL.lend(path) as handle:
            return os.pread(handle, size, offset)

    def _check(self) -> None:
        for number, shard in enumerate(self.shards):
            first, end = int(self._first[number]), int(self._first[number + 1])
            for index in sorted({first, (first + end) // 2, end - 1}) if end > first else ():
                try:
                    self.read(index)
                except StorageError as error:
                    raise StorageLost(
                        f"the file system of the data does not answer ({self.path(index)} {error})"
                    ) from error
                except ImageError as error:
                    raise self._refusal(Path(shard), index, error) from None

    def _refusal(self, shard: Path, index: int, error: ImageError) -> UserError:
        if isinstance(cause := error.__cause__, OSError):
            mend = mend_of_too_many() if cause.errno in TOO_MANY else "check the file and its disk"
            return UserError(f"tar shard {shown(shard)} cannot be read ({cause.strerror}): {mend}")
        command = index_command(index_path(shard, self._index_dir), shard, "--force")
        return UserError(
            f"index of {shown(shard)} does not match the tar at sample {shown(self._names.name(index))} "
            f"(the tar was cut, or written again after the index); check the tar, then run: {command}"
        )


def _end_of(index: ShardIndex) -> int:
    """Return the byte behind the data, in whole blocks, of the last part in the index's last sample."""
    end = max((part.offset + part.size for part in index.samples[-1]), default=0) if index.samples else 0
    return -(-end // BLOCK) * BLOCK


def _unlisted_image(shard: Path, index: ShardIndex, tail: bytes) -> str | None:
    """Return the name of the first image behind the last part in the index. A cut one is passed over (allow_cut)."""
    if len(tail) < _USUAL_END and not tail.strip(b"\0"):
        return None
    known, total = {name for name, _ in index.left_out}, os.path.getsize(shard)
    try:
        with open(shard, "rb", buffering=0) as file:
            for member in TarMembers(shard, _end_of(index)):
                if member.isdir() or member.name in known or member.offset_data + member.size > total:
                    continue
                part = part_of(member, file.fileno())
                if isinstance(part, Part) and is_image(part.extension):
                    return part.name
    except (tarfile.TarError, ValueError):  # the tar is cut here; its whole members have been looked at
        pass
    return None


def _field(extension: str) -> str:
    """Return the name that an image's part has beside its format: "depth" of depth.png, "" of png."""
    return extension.rpartition(".")[0]


def _label_part(image: Part, label: Part | None, shard: str) -> tuple[int, int]:
    if label is None:
        raise UserError(f"labels were asked for, but sample {shown(image.name)} of {shown(shard)} has no cls part")
    return label.offset, label.size


def read_member(shard: Path, member: str, index_dir: Path | None = None) -> bytes:
    """Read one image of an indexed shard by its member's name. ImageError if the shard has no such image."""
    source = TarSource([shard], index_dir=index_dir)
    try:
        for index in range(source.num_images):
            if source._names.name(index) == member:
                return source.read(index)
        raise ImageError("the shard has no such member")
    finally:
        source.close()
