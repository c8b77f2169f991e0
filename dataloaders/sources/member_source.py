"""Read images inside files that hold several each, in one order: files by name, members as the file numbers them.

An image is called FILE::MEMBER, in messages, manifests and results, as a member of a tar shard is. It is called
FILE:KEY::MEMBER if KEY chooses among what the file holds, so that its name is enough to read it again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from mirl.dataloaders.errors import ImageError
from mirl.dataloaders.sources.block_cache import BLOCKS
from mirl.dataloaders.sources.containers import PARQUET, Container, Reading, container_opener, unit_of
from mirl.dataloaders.sources.ledger import Ledger
from mirl.dataloaders.sources.paths import PathTable, shown
from mirl.dataloaders.sources.patience import find_patiently
from mirl.errors import UserError

_OPENED_AT_ONCE = 8
Passed = Callable[[str], str | None]


class MemberSource:
    """This source has all images of some files of one kind. Labels are in the files, or else are their class folders.

    arrays: the images are numbers, not pictures.
    """

    def __init__(
        self,
        root: Path,
        files: Sequence[str],
        kind: str,
        *,
        reading: Reading | None = None,
        passed_over: Passed = lambda name: None,
        class_folders: Callable[[list[str], Path], tuple[list[str], list[int]]] | None = None,
        every_name: bool = False,
    ) -> None:
        """Open the files.

        files: names below root, sorted. passed_over: the reason why an image, by its name, is left out, or None.
        class_folders: numbers the files by their folders; None: labels come from the files alone.
        UserError if a file cannot be used, if files name different classes, or if there is no image.
        """
        self.root, self.files, self.arrays = root, list(files), kind != PARQUET
        reading = reading or Reading()
        self._key = f":{reading.key}" if reading.key else ""
        opener = container_opener(kind)
        with ThreadPoolExecutor(_OPENED_AT_ONCE) as pool:
            self._containers: list[Container] = list(
                pool.map(lambda name: find_patiently(lambda: opener(root / name, reading), shown(name)), self.files)
            )
        self.ledger = Ledger(unit_of(kind, len(self.files)), every_name=every_name)
        self.classes, self._file_labels = self._labelling(reading.labels, class_folders)
        numbers: list[np.ndarray] = []

        def names() -> Iterator[str]:
            for file, container in zip(self.files, self._containers, strict=True):
                kept = []
                for member, reason in container.left_out:
                    self.ledger.leave_out(reason, os.path.join(root, file), member or None)
                for number, member in enumerate(container.names):
                    if (reason := passed_over(self._called(file, member))) is not None:
                        self.ledger.leave_out(reason, os.path.join(root, file), member or None)
                        continue
                    kept.append(number)
                    yield member
                numbers.append(np.asarray(kept, np.int32))

        self._names = PathTable("", names())
        self._numbers = np.concatenate(numbers)
        self._first = np.cumsum([0, *map(len, numbers)])
        self.num_images = self.ledger.images = len(self._names)
        if not self.num_images:
            more = f" (and {len(self.files) - 1} more)" if len(self.files) > 1 else ""
            raise UserError(f"{shown(root / self.files[0])}{more} has no image: give other files; {self.ledger}")

    def name(self, index: int) -> str:
        """Return FILE::MEMBER below the root, or FILE if it holds a single image. A choice follows FILE: FILE:KEY."""
        return self._called(self.files[self._file(index)], self._names.name(index))

    def plain_name(self, index: int) -> str:
        """Return FILE/MEMBER, the name of a copy."""
        file, member = self.files[self._file(index)], self._names.name(index)
        return f"{file}/{member}" if member else file

    def path(self, index: int) -> str:
        return os.path.join(self.root, self.name(index))

    def read(self, index: int) -> bytes:
        return self._containers[self._file(index)].read(int(self._numbers[index]))

    def label(self, index: int) -> int:
        if self._file_labels is not None:
            return self._file_labels[self._file(index)]
        container = self._containers[self._file(index)]
        if not container.has_labels:
            raise ValueError("this data set was opened without labels; open it with labels=True")
        number = container.label(int(self._numbers[index]))
        if self.classes is not None and number >= len(self.classes):
            raise ImageError(f"its label is {number}, but the file names {len(self.classes)} classes")
        return number

    def fingerprint(self) -> str:
        hasher = hashlib.blake2b(f"{self._names.digest()}{self._key}".encode(), digest_size=8)
        for file, end in zip(self.files, self._first[1:].tolist(), strict=True):
            hasher.update(os.fsencode(f"{file}\0{end}\0"))
        return hasher.hexdigest()

    def close(self) -> None:
        paths = {os.fspath(self.root / file) for file in self.files}
        BLOCKS.forget(lambda key: key[0] in paths)

    def find(self, member_path: str) -> int | None:
        """Return the number of the image of this name; None if no image has it."""
        return next((index for index in range(self.num_images) if self.name(index) == member_path), None)

    def _called(self, file: str, member: str) -> str:
        return f"{file}{self._key}::{member}" if member else f"{file}{self._key}"

    def _file(self, index: int) -> int:
        return int(np.searchsorted(self._first, index, side="right")) - 1

    def _labelling(
        self, labels: bool, class_folders: Callable[[list[str], Path], tuple[list[str], list[int]]] | None
    ) -> tuple[list[str] | None, list[int] | None]:
        """Return (class names, label of each file); the second is None if the files have labels of their own."""
        if not labels:
            return None, None
        if not all(container.has_labels for container in self._containers):
            if class_folders is None:
                raise UserError(f"labels were asked for, but {shown(self.root / self.files[0])} has none")
            return class_folders(self.files, self.root)
        first = self._containers[0].classes
        for file, container in zip(self.files, self._containers, strict=True):
            if container.classes != first:
                raise UserError(
                    f"{shown(self.root / self.files[0])} and {shown(self.root / file)} name different classes: give "
                    "them one by one, so that they are joined by name"
                )
        return first, None
