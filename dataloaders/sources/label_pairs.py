"""Find the label image of each image, in the layouts that people have.

| what is given                             | images                          | label images                          |
|-------------------------------------------|---------------------------------|---------------------------------------|
| two folders                               | any below the first             | below the second, under the same name |
| a text list                               | first path of a line            | second, after a tab                   |
| a folder with images/ and annotations/,   | images/, or in it training/ and | the same below the other folder       |
| labels/ or masks/ (ADE20K)                | validation/, or train/ and val/ |                                       |
| leftImg8bit/ and gtFine/ (Cityscapes)     | leftImg8bit/SPLIT/              | ..._gtFine_labelTrainIds or _labelIds |
| JPEGImages/ and SegmentationClass/ (VOC)  | by ImageSets/Segmentation/      | SegmentationClass/                    |

Names are matched without their suffix. An image without a label image is left out and counted; a label image without
an image is refused. UserError names the path and the mend.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mirl.dataloaders.sources.base import FileSource, read_whole_file
from mirl.dataloaders.sources.label_map import map_beside
from mirl.dataloaders.sources.ledger import Ledger, join_ledgers
from mirl.dataloaders.sources.listing import LIST_SUFFIXES, find_files
from mirl.dataloaders.sources.paths import PathTable, shown
from mirl.errors import UserError

SPLITS = {"train": ("training", "train"), "val": ("validation", "val")}
_LABEL_FOLDERS = ("annotations", "labels", "masks")


class PairSource(FileSource):
    """This source has images, each with a label image.

    ``named_map``: the label map of its layout, one of `label_map.NAMED`, or "". ``map_file``: a file with a label map
    beside the data, or None. ``root``: the folder given.
    """

    def __init__(
        self, images: Sequence[str], labels: Sequence[str], *, ledger: Ledger, root: Path, named_map: str = "",
        map_file: Path | None = None,
    ) -> None:  # fmt: skip
        super().__init__(PathTable("", images), ledger=ledger)
        self.label_paths = PathTable("", labels)
        self.root, self.named_map, self.map_file = root, named_map, map_file

    def label_path(self, index: int) -> str:
        """Return the path of the label image."""
        return self.label_paths[index]

    def read_label(self, index: int) -> bytes:
        """Read the encoded label image. ImageError if it cannot be had."""
        return read_whole_file(self.label_paths[index])

    def fingerprint(self) -> str:
        """Return a digest of the names of images and label images, below the folder given."""
        root = os.path.abspath(self.root)
        names = [
            os.path.relpath(os.path.abspath(table[index]), root)
            for table in (self.paths, self.label_paths)
            for index in range(len(table))
        ]
        return hashlib.blake2b("\0".join(names).encode(errors="surrogateescape"), digest_size=8).hexdigest()


@dataclass(frozen=True)
class _Folders:
    """These are a folder of images, one of label images, and how a name of each becomes the key that both share.

    named_map: the map of the layout, or "". only: the keys that are taken; None: all.
    """

    images: Path
    labels: Path
    image_key: Callable[[str], str]
    label_key: Callable[[str], str | None]
    named_map: str = ""
    only: frozenset[str] | None = None


def open_pairs(data: Sequence[str | Path], labels: Sequence[str | Path], *, split: str = "train") -> PairSource:
    """Open the pairs that ``data`` names, in one order on every machine; ``labels``: folders of label images, or none.

    split: "train" or "val", of a layout that has both. UserError for whatever leaves nothing to train on.
    """
    roots = [Path(root).expanduser() for root in data]
    beside = [Path(root).expanduser() for root in labels]
    if not roots:
        raise UserError("data is not given: name a folder of images with --labels, a list of pairs, or a data set")
    if beside and len(beside) != len(roots):
        raise UserError(
            f"labels has {len(beside)} folders and data has {len(roots)}: give a folder of label images for each"
        )
    parts = [_open_one(root, beside[at] if beside else None, split) for at, root in enumerate(roots)]
    if len(parts) == 1:
        return parts[0]
    images = [part.path(index) for part in parts for index in range(part.num_images)]
    files = [part.label_path(index) for part in parts for index in range(part.num_images)]
    maps = {(part.named_map, part.map_file and part.map_file.read_text()) for part in parts}
    if len(maps) > 1:
        raise UserError(
            f"the folders of data have different label maps ({', '.join(map(str, roots))}): give --label-map"
        )
    return PairSource(
        images, files, ledger=join_ledgers(part.ledger for part in parts), root=Path(os.path.commonpath(
            [os.path.abspath(part.root) for part in parts])),
        named_map=parts[0].named_map, map_file=parts[0].map_file,
    )  # fmt: skip


def has_split(root: str | Path, split: str) -> bool:
    """Say whether a data set has images of ``split`` in its layout."""
    root = Path(root).expanduser()
    if not root.is_dir():
        return False
    if (root / "JPEGImages").is_dir():
        return (root / "ImageSets" / "Segmentation" / f"{split}.txt").is_file()
    images = root / ("leftImg8bit" if (root / "leftImg8bit").is_dir() else "images")
    return any((images / name).is_dir() for name in SPLITS[split])


def _open_one(root: Path, labels: Path | None, split: str) -> PairSource:
    if not root.exists():
        raise UserError(f"data {shown(root)} does not exist; check the path")
    if root.suffix.lower() in (".json", ".jsonl"):
        raise UserError(
            f"data {shown(root)} is a JSON file, as COCO's annotations are, which are for detection: mirl segment "
            "needs label images, which hold the class of every pixel"
        )
    if root.is_file():
        if root.suffix.lower() not in LIST_SUFFIXES:
            raise UserError(
                f"data {shown(root)} is neither a folder nor a list ({', '.join(LIST_SUFFIXES)}): give a folder of "
                "images, or a list with lines image<TAB>label image"
            )
        return _from_list(root)
    map_file = map_beside(root)
    if labels is not None:
        if not labels.is_dir():
            raise UserError(f"labels is {shown(labels)}, which is no folder: give one of label images")
        return _match(root, _Folders(root, labels, _stem, _stem), map_file or map_beside(root.parent))
    return _match(root, _layout(root, split), map_file)


def _layout(root: Path, split: str) -> _Folders:
    if (root / "leftImg8bit").is_dir() and (root / "gtFine").is_dir():
        return _cityscapes(root, split)
    if (root / "JPEGImages").is_dir() and (root / "SegmentationClass").is_dir():
        listed = root / "ImageSets" / "Segmentation" / f"{split}.txt"
        only = frozenset(listed.read_text().split()) if listed.is_file() else None
        if only is None and split == "val":
            raise UserError(f"{shown(listed)} does not exist: give the images of evaluation by --val")
        return _Folders(root / "JPEGImages", root / "SegmentationClass", _stem, _stem, "voc", only)
    folder = next((root / name for name in _LABEL_FOLDERS if (root / name).is_dir()), None)
    if not (root / "images").is_dir() or folder is None:
        raise UserError(
            f"labels is not given and {shown(root)} has no images/ with {'/, '.join(_LABEL_FOLDERS)}/ beside it, nor "
            "the layout of Cityscapes or VOC: give --labels FOLDER"
        )
    named = "ade20k" if (root / "objectInfo150.txt").is_file() else ""
    for name in SPLITS[split]:
        if (root / "images" / name).is_dir():
            if not (folder / name).is_dir():
                raise UserError(f"{shown(root / 'images' / name)} exists and {shown(folder / name)} does not: give it")
            return _Folders(root / "images" / name, folder / name, _stem, _stem, named)
    if any((root / "images" / name).is_dir() for names in SPLITS.values() for name in names):
        raise UserError(f"{shown(root / 'images')} has no {' or '.join(SPLITS[split])}: give the set of evaluation")
    return _Folders(root / "images", folder, _stem, _stem, named)


def _cityscapes(root: Path, split: str) -> _Folders:
    images = root / "leftImg8bit" / split
    labels = root / "gtFine" / split
    for folder in (images, labels):
        if not folder.is_dir():
            raise UserError(f"{shown(folder)} does not exist: give Cityscapes with leftImg8bit/ and gtFine/")
    ready = any(labels.glob("*/*_gtFine_labelTrainIds.png"))
    end = "_gtFine_labelTrainIds" if ready else "_gtFine_labelIds"

    def image_key(name: str) -> str:
        return _stem(name).removesuffix("_leftImg8bit")

    def label_key(name: str) -> str | None:
        stem = _stem(name)
        return stem.removesuffix(end) if stem.endswith(end) else None  # files of instances and colours lie beside

    return _Folders(images, labels, image_key, label_key, "cityscapes_train_ids" if ready else "cityscapes")


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _match(root: Path, folders: _Folders, map_file: Path | None) -> PairSource:
    images, labels = find_files(folders.images), find_files(folders.labels)
    if not images.images:
        raise UserError(f"{shown(folders.images)} holds no images ({images.ledger}): give a folder of images")
    by_key: dict[str, str] = {}
    for name in labels.images:
        key = folders.label_key(name)
        if key is None:
            continue
        if key in by_key:
            raise UserError(
                f"{shown(folders.labels)} has two label images for {key}: {by_key[key]} and {name}; keep one of them"
            )
        by_key[key] = name
    ledger, pairs = Ledger(), []
    ledger.notes += images.ledger.notes
    for name in images.images:
        key = folders.image_key(name)
        if folders.only is not None and key not in folders.only:
            continue
        label = by_key.pop(key, None)
        if label is None:
            ledger.leave_out("without a label image", os.path.join(folders.images, name))
        else:
            pairs.append((os.path.join(folders.images, name), os.path.join(folders.labels, label)))
    if folders.only is None and by_key:
        example = next(iter(by_key.values()))
        raise UserError(
            f"{len(by_key)} of {len(labels.images)} label images in {shown(folders.labels)} have no image in "
            f"{shown(folders.images)}, e.g. {example}: give images and label images the same names"
        )
    if not pairs:
        raise UserError(
            f"no image in {shown(folders.images)} has a label image of its name in {shown(folders.labels)}, e.g. "
            f"{images.images[0]}: give the folders that belong together"
        )
    return PairSource(
        [image for image, _ in pairs], [label for _, label in pairs], ledger=ledger, root=root,
        named_map=folders.named_map, map_file=map_file,
    )  # fmt: skip


def _from_list(path: Path) -> PairSource:
    """Read lines image<TAB>label image. Relative paths start at the folder of the list."""
    pairs: list[tuple[str, str]] = []
    for number, line in enumerate(path.read_text(errors="surrogateescape").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        cells = [cell.strip() for cell in line.split("\t")]
        if len(cells) != 2 or not all(cells):
            raise UserError(f"list of pairs {shown(path)}: line {number} is not image<TAB>label image; mend it")
        image, label = (os.path.join(path.parent, cell) for cell in cells)
        for file in (image, label):
            if not os.path.isfile(file):
                raise UserError(f"list of pairs {shown(path)}: line {number} names {shown(file)}, which is not there")
        pairs.append((image, label))
    if not pairs:
        raise UserError(f"list of pairs {shown(path)} is empty: give lines image<TAB>label image")
    return PairSource(
        [image for image, _ in pairs], [label for _, label in pairs], ledger=Ledger(), root=path.parent,
        map_file=map_beside(path.parent),
    )  # fmt: skip
