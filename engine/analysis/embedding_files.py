"""Write files of features: .npz for numpy, .safetensors, and .parquet for tables. Each has one row for each image.

| what | .npz and .safetensors | .parquet |
|---|---|---|
| features | float32 [n, D] | a list of D floats |
| index: the image's number in the data set | int64 [n] | int64 |
| label: its class number, -1 where it has none | int64 [n] | int64, null where it has none |
| path | array of text; in .safetensors the bytes of all paths and where each ends | text |
| classes: names by class number | array of text; metadata | metadata |
| about: checkpoint, block, pool, data | one JSON text; metadata | metadata |

A path whose bytes are no UTF-8 keeps them: in .npz as `os.fsdecode` gives it, in .parquet in a binary column.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mirl.errors import UserError


@dataclass(frozen=True)
class Table:
    """The table has the rows to write.

    ``batches`` yields features float32 [n, D] part by part, so that memory need not hold all of them.
    """

    batches: Callable[[], Iterator[np.ndarray]]
    width: int
    index: np.ndarray
    labels: np.ndarray
    paths: list[str]
    classes: list[str]
    about: dict[str, Any]

    def __len__(self) -> int:
        return len(self.index)


def write_npz(table: Table, path: Path) -> None:
    """Write uncompressed, one part after the other."""
    small = {
        "index": table.index, "label": table.labels, "path": _text(table.paths), "classes": _text(table.classes),
        "about": np.array(json.dumps(table.about)),
    }  # fmt: skip
    with zipfile.ZipFile(path, "w") as file:
        with file.open("features.npy", "w", force_zip64=True) as member:
            header = {"descr": "<f4", "fortran_order": False, "shape": (len(table), table.width)}
            np.lib.format.write_array_header_1_0(member, header)
            for batch_nD in table.batches():
                member.write(np.ascontiguousarray(batch_nD, dtype="<f4").tobytes())
        for name, values in small.items():
            with file.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, values, allow_pickle=False)


def write_safetensors(table: Table, path: Path) -> None:
    """Write all features at once, for which memory holds all of them."""
    from safetensors.numpy import save_file

    encoded = [os.fsencode(name) for name in table.paths]
    tensors = {
        "features": np.concatenate(list(table.batches())), "index": table.index, "label": table.labels,
        "path_bytes": np.frombuffer(b"".join(encoded), np.uint8), "path_ends": np.cumsum(list(map(len, encoded))),
    }  # fmt: skip
    save_file(tensors, path, metadata={"classes": json.dumps(table.classes), "about": json.dumps(table.about)})


def write_parquet(table: Table, path: Path) -> None:
    """Write a row group for each part.

    Raises:
        UserError: pyarrow is not installed.
    """
    pyarrow, parquet = require_pyarrow()
    raw = [os.fsencode(name) for name in table.paths]
    try:
        names, kind = [name.decode() for name in raw], pyarrow.large_string()
    except UnicodeDecodeError:
        names, kind = raw, pyarrow.large_binary()
    columns = [
        ("index", pyarrow.int64()), ("path", kind), ("label", pyarrow.int64()),
        ("features", pyarrow.list_(pyarrow.float32(), table.width)),
    ]  # fmt: skip
    metadata = {"classes": json.dumps(table.classes), "about": json.dumps(table.about)}
    schema = pyarrow.schema(columns, metadata=metadata)
    with parquet.ParquetWriter(path, schema) as writer:
        first = 0
        for batch_nD in table.batches():
            rows = slice(first, first + len(batch_nD))
            first = rows.stop
            if not len(batch_nD):
                continue
            labels = table.labels[rows]
            flat = pyarrow.array(np.ascontiguousarray(batch_nD).reshape(-1))
            arrays = [
                pyarrow.array(table.index[rows]), pyarrow.array(names[rows], kind),
                pyarrow.array(labels, mask=labels < 0), pyarrow.FixedSizeListArray.from_arrays(flat, table.width),
            ]  # fmt: skip
            writer.write_table(pyarrow.table(arrays, schema=schema))


def require_pyarrow() -> tuple[Any, Any]:
    """Return pyarrow and its parquet module; UserError with the line that installs them."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"parquet files need pyarrow ({error}): give a .npz file, or pip install pyarrow") from error
    return pyarrow, parquet


WRITERS: dict[str, Callable[[Table, Path], None]] = {
    ".npz": write_npz, ".parquet": write_parquet, ".safetensors": write_safetensors,
}  # fmt: skip


def _text(values: list[str]) -> np.ndarray:
    return np.array(values, dtype=f"U{max(map(len, values), default=1)}")
