"""Read parquet files as Hugging Face's datasets writes them: a column of encoded images, perhaps one of class numbers.

An image is a struct{bytes, path} or the bytes alone; the schema's metadata `huggingface` says which columns are images
and names the classes. A row is read by reading its row group, which stays in memory for a while: the rest of the file
is not touched. Rows are called ROW/NAME, or ROW if the image has no path.
https://huggingface.co/docs/datasets/main/en/about_dataset_features
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mirl.dataloaders.errors import ImageError, one_line
from mirl.dataloaders.sources.block_cache import BLOCKS
from mirl.dataloaders.sources.containers import Reading, needed
from mirl.dataloaders.sources.paths import PathTable, shown
from mirl.dataloaders.sources.patience import is_of_a_moment, patiently
from mirl.errors import UserError

_SPLIT = re.compile(r"(train|val|valid|validation|test)([-._].*)?\.parquet", re.IGNORECASE)
_OTHERS = ("val", "valid", "validation", "test")
_LARGEST_LABEL = 10**9


def of_split(files: Sequence[str], split: str) -> tuple[list[str], list[str]]:
    """Return (files of ``split``, names of the other splits): train-00000-of-00002.parquet beside validation-... .

    The first of val, valid, validation and test that is there is "val". If any file is called otherwise, or train has
    no other split beside it, all files are taken.
    """
    found: dict[str, list[str]] = {}
    for file in files:
        match = _SPLIT.fullmatch(file.rpartition("/")[2])
        if match is None:
            return list(files), []
        found.setdefault(match[1].lower(), []).append(file)
    others = [name for name in _OTHERS if name in found]
    if "train" not in found or not others:
        return list(files), []
    taken = "train" if split == "train" else others[0]
    return found[taken], [name for name in found if name != taken]


def open_parquet(path: Path, reading: Reading) -> ParquetFile:
    """Open the images of one file. UserError if it is no parquet file, or lacks images or the labels asked for."""
    parquet = needed("pyarrow.parquet", "parquet", "parquet files")
    try:
        with parquet.ParquetFile(path) as file:
            return ParquetFile(path, file, parquet, reading)
    except UserError:
        raise
    except OSError as error:
        if is_of_a_moment(error) or isinstance(error, PermissionError):
            raise
        raise UserError(f"parquet file {shown(path)} cannot be read ({one_line(error)}): check it") from None
    except Exception as error:  # Arrow raises many types
        raise UserError(f"parquet file {shown(path)} cannot be read ({one_line(error)}): write it again") from None


class ParquetFile:
    """The members of a parquet file are its rows that hold an image; see `Container`."""

    def __init__(self, path: Path, file: Any, parquet: Any, reading: Reading) -> None:
        self.path, self._parquet, self._metadata = os.fspath(path), parquet, file.metadata
        self._stamp = _stamp(self.path)
        schema, features = file.schema_arrow, _features(file.schema_arrow)
        column = _image_column(self.path, schema, features, reading.choice.images)
        self._is_struct = _is_struct(schema.field(column).type)
        self._bytes_column = f"{column}.bytes" if self._is_struct else column
        self._first = np.cumsum(
            [0, *(self._metadata.row_group(group).num_rows for group in range(self._metadata.num_row_groups))]
        )
        self.has_labels, self.classes = False, None
        self._labels = np.empty(0, np.int64)
        if reading.labels:
            chosen = _label_column(self.path, schema, features, reading.choice.labels)
            self.classes = features.get(chosen, {}).get("names")
            column_of_labels = file.read(columns=[chosen]).column(0)
            self._labels = column_of_labels.cast("int64").fill_null(-1).to_numpy()
            self.has_labels = True
        rows = self._rows_with_image(file)
        names = _paths(file, column) if self._is_struct and _has_paths(schema.field(column).type) else None
        self._rows = rows
        self.names = PathTable("", (_name(row, names) for row in rows.tolist()))
        missing = np.setdiff1d(np.arange(int(self._first[-1])), rows)
        self.left_out = [(_name(row, names), "rows without an image") for row in missing.tolist()]

    def read(self, number: int) -> bytes:
        row = int(self._rows[number])
        group = int(np.searchsorted(self._first, row, side="right")) - 1
        column = BLOCKS.get((self.path, group), partial(self._read_group, group))
        return column[row - int(self._first[group])].as_py()

    def label(self, number: int) -> int:
        label = int(self._labels[self._rows[number]])
        if not 0 <= label < _LARGEST_LABEL:
            raise ImageError(f"its label is {'missing' if label == -1 else label}, not a class number")
        return label

    def _read_group(self, group: int) -> tuple[Any, int]:
        """Read the encoded images of one row group, and count their bytes."""
        try:
            return patiently(partial(self._read_group_once, group), self.path)
        except FileNotFoundError:
            raise ImageError("the file no longer exists") from None
        except ImageError:
            raise
        except Exception as error:  # Arrow raises many types
            raise ImageError(f"row group {group} cannot be read: {one_line(error)}") from error

    def _read_group_once(self, group: int) -> tuple[Any, int]:
        if _stamp(self.path) != self._stamp:
            raise ImageError("the file was written again after it was opened")
        with self._parquet.ParquetFile(self.path, metadata=self._metadata) as file:
            return self._column(file, group)

    def _column(self, file: Any, group: int) -> tuple[Any, int]:
        table = file.read_row_group(group, columns=[self._bytes_column], use_threads=False)
        column = (table.flatten() if self._is_struct else table).column(0)
        return column, column.nbytes

    def _rows_with_image(self, file: Any) -> np.ndarray:
        """Return the numbers of the rows that hold bytes. Only row groups that may lack some are looked into."""
        rows = []
        for group in range(self._metadata.num_row_groups):
            there = np.arange(int(self._first[group]), int(self._first[group + 1]))
            if _nulls(self._metadata.row_group(group), self._bytes_column) != 0:
                column, _ = self._column(file, group)
                there = there[column.is_valid().to_numpy()]
            rows.append(there)
        return np.concatenate(rows) if rows else np.empty(0, np.int64)


def _stamp(path: str) -> tuple[int, int]:
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """Return what the metadata `huggingface` says of the columns; {} if the schema has no such metadata."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, TypeError, ValueError):
        return {}


def _image_column(path: str, schema: Any, features: dict[str, dict[str, Any]], chosen: str) -> str:
    if chosen:
        if chosen not in schema.names:
            raise UserError(f"{shown(path)} has no column {chosen!r}: give one of {', '.join(schema.names)}")
        if not (_is_struct(schema.field(chosen).type) or _is_binary(schema.field(chosen).type)):
            raise UserError(f"column {chosen!r} of {shown(path)} is {schema.field(chosen).type}: give one of images")
        return chosen
    fields = {field.name: field.type for field in schema}
    images = [name for name in fields if features.get(name, {}).get("_type") == "Image" and _holds_bytes(fields[name])]
    images = images or [name for name, kind in fields.items() if _is_struct(kind)]
    images = images or [name for name, kind in fields.items() if _is_binary(kind)]
    if not images:
        some = ", ".join(f"{name} ({kind})" for name, kind in list(fields.items())[:5])
        raise UserError(
            f"{shown(path)} has no column of images, a struct of bytes and path or bytes alone; it has {shown(some)}"
        )
    if len(images) > 1 and "image" not in images:
        raise UserError(
            f"{shown(path)} has {len(images)} columns of images ({', '.join(images)}): choose one, "
            f"{shown(path)}:{images[0]}"
        )
    return "image" if "image" in images else images[0]


def _label_column(path: str, schema: Any, features: dict[str, dict[str, Any]], chosen: str) -> str:
    if chosen and chosen not in schema.names:
        raise UserError(f"{shown(path)} has no column {chosen!r}: give one of {', '.join(schema.names)}")
    named = [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
    candidates = [chosen] if chosen else ["label"] if "label" in schema.names else named
    if not candidates:
        raise UserError(f"labels were asked for, but {shown(path)} has no column `label`; it has {schema.names}")
    if len(candidates) > 1:
        raise UserError(
            f"{shown(path)} has {len(candidates)} columns of labels ({', '.join(candidates)}): choose images and "
            f"labels, {shown(path)}:IMAGES,{candidates[0]}"
        )
    kind = str(schema.field(candidates[0]).type)
    if not re.fullmatch(r"u?int(8|16|32|64)", kind):
        raise UserError(
            f"column {candidates[0]!r} of {shown(path)} is {kind}, no class numbers: write it as a ClassLabel"
        )
    return candidates[0]


def _holds_bytes(kind: Any) -> bool:
    return _is_struct(kind) or _is_binary(kind)


def _is_struct(kind: Any) -> bool:
    """Say whether a column's type is a struct with a field `bytes`."""
    return any(_is_binary(field.type) for field in kind if field.name == "bytes") if _fields(kind) else False


def _has_paths(kind: Any) -> bool:
    return any(field.name == "path" and "string" in str(field.type) for field in kind)


def _fields(kind: Any) -> bool:
    return str(kind).startswith("struct<")


def _is_binary(kind: Any) -> bool:
    return str(kind) in ("binary", "large_binary", "binary_view")


def _nulls(group: Any, column: str) -> int | None:
    """Return how many rows of the group have no value in the column; None if the file does not record it."""
    for number in range(group.num_columns):
        chunk = group.column(number)
        if chunk.path_in_schema == column:
            known = chunk.statistics is not None and chunk.statistics.has_null_count
            return chunk.statistics.null_count if known else None
    return None


def _paths(file: Any, column: str) -> list[str | None]:
    return file.read(columns=[f"{column}.path"]).flatten().column(0).to_pylist()


def _name(row: int, paths: Sequence[str | None] | None) -> str:
    """Return ROW/NAME. The row comes first, since two images may have one name."""
    name = "" if paths is None else os.path.basename(paths[row] or "")
    return f"{row}/{name}" if name else str(row)
