"""Refuse a segmentation run before torch is imported: a missing checkpoint, data without pairs, a bad label map.

The run opens everything again, and looks into the label images too.
"""

from __future__ import annotations

from pathlib import Path

from mirl.dataloaders.sources.label_map import LabelMap, named_map, read_label_map, require_same_names
from mirl.dataloaders.sources.label_pairs import PairSource, has_split, open_pairs
from mirl.engine.checkpoints.files import list_checkpoints
from mirl.engine.checkpoints.finding import locate
from mirl.engine.transfer.segmentation.config import SegmentConfig
from mirl.errors import UserError


def refuse_early(config: SegmentConfig) -> None:
    """Raise what the run would raise some seconds later, if a look at names is enough. UserError."""
    require_inputs(config)
    if not config.run.resume:
        checkpoint = Path(config.segment.checkpoint)
        single = (checkpoint / "manifest.json").is_file() or (checkpoint / "state.json").is_file()
        if not (single or list_checkpoints(checkpoint) or list_checkpoints(checkpoint / "checkpoints")):
            locate(checkpoint)  # it raises; other checkpoints are spared, because it reads them whole
    train, val = open_sets(config)
    given_map(config, train, val)


def require_inputs(config: SegmentConfig) -> None:
    """Raise UserError if data or a first checkpoint is not given, or a flag goes without its companion."""
    section = config.segment
    if not config.data.data:
        raise UserError("data is not given: name a folder of images with --labels, a list of pairs, or a data set")
    if section.val_labels and not section.val:
        raise UserError("val_labels is given and val is not: name the images of these label images by --val")
    if not config.run.resume and not section.checkpoint:
        raise UserError("checkpoint is not given: name a pre-trained checkpoint, or the folder of a run")


def open_sets(config: SegmentConfig) -> tuple[PairSource, PairSource | None]:
    """Open the pairs of training and of evaluation; the latter are None if there are none."""
    section, data = config.segment, config.data.data
    train = open_pairs(data, section.labels)
    if section.val:
        return train, open_pairs(section.val, section.val_labels, split="val")
    if not section.labels and all(has_split(root, "val") for root in data):
        return train, open_pairs(data, (), split="val")
    return train, None


def given_map(config: SegmentConfig, train: PairSource, val: PairSource | None) -> LabelMap | None:
    """Return the meaning of the values by --label-map, by a file beside the images, or by the layout; else None.

    UserError if the sets of training and of evaluation give other meanings.
    """
    section = config.segment
    if section.label_map:
        found = read_label_map(section.label_map, train.root)
    else:
        found, theirs = _own_map(train), None if val is None else _own_map(val)
        if found is not None and theirs is not None:
            require_same_names(found, theirs, train="data", val="val")
    return None if found is None else found.with_ignored(section.ignore)


def _own_map(source: PairSource) -> LabelMap | None:
    if source.map_file is not None:
        return read_label_map(str(source.map_file))
    return named_map(source.named_map, source.root) if source.named_map else None
