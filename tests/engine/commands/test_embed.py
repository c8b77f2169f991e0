"""`mirl embed`: every image has its row, in order, whatever interrupted it, on any number of ranks, in each format."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from mirl.dataloaders import open_source
from mirl.engine.analysis import embedding
from mirl.engine.analysis.embedding import Parts, embed_parts
from mirl.engine.analysis.features import extract_features, load_frozen_encoder
from mirl.engine.cli import dispatch
from mirl.engine.distributed.launch import Ranks
from mirl.errors import UserError
from tests.engine.conftest import write_classes
from tests.engine.models.helpers import tiny_config

ODD = os.fsdecode(b"odd \xff\n name.png")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two classes; one name that is no UTF-8, one image that is broken."""
    root = write_classes(tmp_path / "data", {"a": 4, "b": 5})
    (root / "a" / "00.png").rename(root / "a" / ODD)
    (root / "b" / "02.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    return root


@pytest.fixture
def encoder(checkpoint) -> Path:
    return checkpoint(tiny_config(segments=2))


def embed(encoder: Path, data: Path, out: Path, *flags: str) -> None:
    assert dispatch(["embed", str(encoder), "--data", str(data), "--out", str(out), "--device", "cpu", *flags]) == 0


def read(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def test_every_format_has_every_image_with_its_path_label_and_number(encoder, data, tmp_path, capsys):
    for suffix in (".npz", ".safetensors", ".parquet"):
        embed(encoder, data, tmp_path / f"out{suffix}", "--batch-size", "2")
    assert "1 broken image without a row" in (said := capsys.readouterr().out) and "b/02.png" in said
    found = read(tmp_path / "out.npz")
    expected = extract_features(load_frozen_encoder(encoder), data, pool="avg", device=torch.device("cpu"))
    # The batches differ, and with them the order of float32 sums.
    np.testing.assert_allclose(found["features"], expected.features.numpy(), rtol=1e-5, atol=1e-6)
    assert found["label"].tolist() == expected.labels.tolist() == [0] * 4 + [1] * 4
    source = open_source(data, labels=True)
    assert found["index"].tolist() == [number for number in range(9) if not source.path(number).endswith("b/02.png")]
    assert found["path"].tolist() == [source.path(int(number)) for number in found["index"]]
    assert found["classes"].tolist() == ["a", "b"] and json.loads(str(found["about"]))["pool"] == "avg"

    with safe_open(tmp_path / "out.safetensors", "np") as file:
        assert np.array_equal(file.get_tensor("features"), found["features"])
        assert np.array_equal(file.get_tensor("label"), found["label"])
        text, ends = file.get_tensor("path_bytes").tobytes(), file.get_tensor("path_ends").tolist()
        names = [text[first:last] for first, last in zip([0, *ends], ends, strict=False)]
        assert [os.fsdecode(name) for name in names] == found["path"].tolist()
        assert json.loads(file.metadata()["classes"]) == ["a", "b"]

    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(tmp_path / "out.parquet")
    assert np.array_equal(np.stack(table["features"].to_numpy()), found["features"])
    assert [os.fsdecode(name) for name in table["path"].to_pylist()] == found[
        "path"
    ].tolist()  # binary: one is no UTF-8
    assert table["index"].to_pylist() == found["index"].tolist() and table["label"].null_count == 0
    assert not list(tmp_path.glob("*.parts")) and not list(tmp_path.glob(".*partial"))


def test_a_set_without_labels_and_the_features_of_a_block(encoder, tmp_path):
    data = write_classes(tmp_path / "data", {"a": 3})
    for path in sorted((data / "a").iterdir()):
        path.rename(data / path.name)
    (data / "a").rmdir()
    embed(encoder, data, tmp_path / "all.parquet", "--block", "1", "--pool", "token")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(tmp_path / "all.parquet")
    assert table["label"].null_count == 3 and str(table["path"][0]).endswith("00.png")
    model = load_frozen_encoder(encoder)
    config = model.config
    embed(encoder, data, tmp_path / "last.npz", "--block", "-1")
    pixels = torch.zeros(2, config.image_height, config.image_width, 3, dtype=torch.uint8)
    for block in range(config.depth):
        assert torch.equal(model.features_after(pixels, block, "avg"), model.block_features(pixels)[block])
    assert f"block {config.depth - 1} of" in json.loads(str(read(tmp_path / "last.npz")["about"]))["block"]


def test_what_was_made_is_not_made_again(encoder, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(embedding, "PART", 2)
    embed(encoder, data, tmp_path / "whole.npz", "--batch-size", "3")
    write, written = Parts.write, []

    def stop_at_third(self: Parts, part: int, *arrays: np.ndarray) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(part)
        write(self, part, *arrays)

    monkeypatch.setattr(Parts, "write", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        embed(encoder, data, tmp_path / "again.npz", "--batch-size", "3")
    assert not (tmp_path / "again.npz").exists()
    made: list[int] = []
    monkeypatch.setattr(Parts, "write", lambda self, part, *arrays: made.append(part) or write(self, part, *arrays))
    with pytest.raises(UserError, match="holds parts of an earlier start with pool avg, now it is token"):
        embed(encoder, data, tmp_path / "again.npz", "--pool", "token")
    embed(encoder, data, tmp_path / "again.npz", "--batch-size", "3")
    assert "going on: 2 of 5 parts were made before" in capsys.readouterr().out and made == [2, 3, 4]
    whole, again = read(tmp_path / "whole.npz"), read(tmp_path / "again.npz")
    assert whole.keys() == again.keys()
    for name in whole:
        assert np.array_equal(whole[name], again[name]) or np.allclose(whole[name], again[name], rtol=1e-5), name


def test_ranks_share_the_parts(encoder, data, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "PART", 2)
    embed(encoder, data, tmp_path / "one.npz")
    model, source = load_frozen_encoder(encoder), open_source(data)
    parts = Parts(tmp_path / "parts", source.num_images, {})
    parts.begin()
    missing, done = parts.missing(), []
    for rank in (1, 0):
        ranks = Ranks(rank=rank, world_size=2, local_rank=rank, local_world_size=2, device=torch.device("cpu"))
        broken = embed_parts(
            parts, missing, model, source, lambda images: model.tokens(images)[:, 1:].mean(1), ranks=ranks,
            batch_size=3, threads=1, advance=done.append,
        )  # fmt: skip
        assert len(broken) == (1 if "b/02.png" in str([bad.path for bad in broken]) else 0)
    assert sum(done) == 9
    features, index = (np.concatenate(arrays) for arrays in zip(*parts.read(), strict=True))
    one = read(tmp_path / "one.npz")
    assert np.array_equal(index, one["index"])
    np.testing.assert_allclose(features, one["features"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--out", "x.csv"], "x.csv: give a name that ends with .npz, .parquet or .safetensors"),
        (["--out", "taken.npz"], "which exists: give another name or --overwrite"),
        (["--out", "x.npz", "--batch-size", "0"], "batch_size is 0: give 1 or more"),
        (["--out", "x.npz", "--block", "9"], "block is 9: the encoder has 4 blocks, give 0 to 3"),
    ],
)
def test_wrong_flags_are_refused(flags, told, encoder, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("taken.npz").touch()
    with pytest.raises(UserError, match=told):
        dispatch(["embed", str(encoder), "--data", str(data), *flags])
    assert not list(tmp_path.glob("x*"))


def test_a_taken_name_is_written_over_if_that_is_said(encoder, tmp_path):
    data = write_classes(tmp_path / "data", {"a": 2, "b": 2})
    (tmp_path / "x.npz").touch()
    embed(encoder, data, tmp_path / "x.npz", "--overwrite")
    assert read(tmp_path / "x.npz")["features"].shape == (4, tiny_config().width)
