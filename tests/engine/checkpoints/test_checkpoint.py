"""Checkpoints: whole or absent, verified, readable in any split."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from mirl.dataloaders.sources.manifest import atomic_writer
from mirl.engine.checkpoints.files import write_weights
from mirl.engine.checkpoints.reader import CheckpointReader, find_newest_good, locate, verify
from mirl.engine.checkpoints.writer import CheckpointWriter, list_checkpoints
from mirl.engine.distributed.ds_engine import Fragment
from mirl.engine.distributed.launch import Ranks
from mirl.errors import UserError
from tests.support.files import flip_bit

SHAPES = {"a.weight": [4, 5], "b": [1, 1, 7]}


def ranks(rank: int = 0, world_size: int = 1) -> Ranks:
    """A rank whose agreements are made by hand: both writers of a test live in one process."""

    class Alone(Ranks):
        def broadcast(self, value):
            return value

        def barrier(self):
            return None

    return Alone(
        rank=rank, world_size=world_size, local_rank=rank, local_world_size=world_size, device=torch.device("cpu")
    )


def values(seed: int) -> dict[tuple[str, str], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        (kind, name): torch.randn(torch.Size(shape).numel(), generator=generator)
        for kind in ("weight", "exp_avg", "exp_avg_sq")
        for name, shape in SHAPES.items()
    }


def fragments(tensors, rank: int = 0, world_size: int = 1) -> list[Fragment]:
    """An uneven share for each rank: the last one gets the rest."""
    result = []
    for (kind, name), tensor in tensors.items():
        size = len(tensor) // world_size
        start, stop = rank * size, len(tensor) if rank == world_size - 1 else (rank + 1) * size
        result.append(Fragment(name=name, kind=kind, start=start, tensor=tensor[start:stop]))
    return result


def state(step: int) -> dict:
    return {"step": step, "parameters": SHAPES, "config": {"model": {"name": "test"}}}


def save(folder: Path, step: int, *, keep: int = 0, world_size: int = 1) -> dict:
    tensors = values(step)
    writers = [CheckpointWriter(folder, ranks(rank, world_size), keep=keep) for rank in range(world_size)]
    for writer in writers[1:]:
        writer._token = writers[0]._token
    for rank, writer in enumerate(writers):
        writer.save(step, fragments(tensors, rank, world_size), state(step))
    for writer in writers:
        writer.wait()
        assert writer.poll()[1] is None
    return tensors


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_any_part_of_any_parameter_is_read_back(tmp_path, world_size):
    tensors = save(tmp_path, 5, world_size=world_size)
    reader = CheckpointReader(tmp_path / "step-00000005")
    for (kind, name), tensor in tensors.items():
        for start, stop in ((0, len(tensor)), (1, 3), (2, len(tensor)), (len(tensor) - 1, len(tensor))):
            assert torch.equal(reader.read(name, kind, start, stop - start), tensor[start:stop])
    assert {name: list(weight.shape) for name, weight in reader.weights().items()} == SHAPES


def test_pointer_and_pruning(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]
    assert (tmp_path / "latest").read_text() == "step-00000004\n"
    assert not list(tmp_path.glob(".step-*"))


def test_whoever_may_read_other_files_may_read_the_weights(tmp_path):
    umask = os.umask(0o027)
    try:
        save(tmp_path, 10)
    finally:
        os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.glob("step-*/*")} == {0o640}


def test_the_caller_may_change_its_tensors_after_save(tmp_path):
    tensors = values(0)
    writer = CheckpointWriter(tmp_path, ranks(), keep=0)
    expected = tensors["weight", "b"].clone()
    writer.save(1, fragments(tensors), state(1))
    tensors["weight", "b"].zero_()
    writer.wait()
    assert torch.equal(CheckpointReader(tmp_path / "step-00000001").read("b", "weight", 0, 7), expected)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip_bit, "sha256 differs"),
        (lambda path: os.truncate(path, 100), "has 100 bytes instead of"),
        (lambda path: path.unlink(), "is missing"),
        (lambda path: (path.parent / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda path: (path.parent / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda path: (path.parent / "state.json").write_text("{}"), "state.json has 2 bytes instead of"),
    ],
)
def test_damage_is_found_and_the_one_before_is_taken(tmp_path, damage, reason):
    save(tmp_path, 1)
    save(tmp_path, 2)
    damage(tmp_path / "step-00000002" / "rank-00000-of-00001.safetensors")
    found, remarks = find_newest_good(tmp_path)
    assert found == tmp_path / "step-00000001"
    assert reason in remarks[0]
    if reason != "manifest.json is missing":  # then it no longer looks like a checkpoint at all
        with pytest.raises(UserError, match="is damaged"):
            locate(tmp_path / "step-00000002")


@pytest.mark.parametrize("pointer", ["", "step-99999999", "../../etc", None])
def test_a_wrong_pointer_is_told_and_does_not_matter(tmp_path, pointer):
    save(tmp_path, 1)
    save(tmp_path, 2)
    if pointer is None:
        (tmp_path / "latest").unlink()
    else:
        (tmp_path / "latest").write_text(pointer)
    found, remarks = find_newest_good(tmp_path)
    assert found == tmp_path / "step-00000002"
    assert "latest" in remarks[0]


def test_locate_takes_a_run_its_folder_or_a_checkpoint(tmp_path):
    save(tmp_path / "checkpoints", 7)
    expected = tmp_path / "checkpoints" / "step-00000007"
    assert locate(tmp_path) == locate(tmp_path / "checkpoints") == locate(expected) == expected
    with pytest.raises(UserError, match="does not exist"):
        locate(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no checkpoint"):
        locate(tmp_path / "empty")


def test_a_missing_rank_file_listed_nowhere_is_an_incomplete_checkpoint(tmp_path):
    save(tmp_path, 1, world_size=2)
    path = tmp_path / "step-00000001"
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["files"]["rank-00001-of-00002.safetensors"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / "rank-00001-of-00002.safetensors").unlink()
    assert verify(path) is None
    with pytest.raises(UserError, match="checkpoint is incomplete"):
        CheckpointReader(path).weights()


def test_pieces_that_overlap_do_not_make_up_for_one_that_is_missing(tmp_path):
    """Elements 0..2 and 1..3 of a parameter of seven, and 5..6: seven elements counted, six there."""
    tensors = values(1)
    kept = [piece for piece in fragments(tensors) if (piece.kind, piece.name) != ("weight", "b")]
    whole = tensors["weight", "b"]
    cut = [Fragment(name="b", kind="weight", start=start, tensor=whole[start : start + size].clone())
           for start, size in ((0, 3), (1, 2), (5, 2))]  # fmt: skip
    writer = CheckpointWriter(tmp_path, ranks(), keep=0)
    writer.save(1, [*kept, *cut], state(1))
    writer.wait()
    reader = CheckpointReader(tmp_path / "step-00000001")
    with pytest.raises(UserError, match="holds element 1 of weight b twice, in rank-00000-of-00001.safetensors"):
        reader.read("b", "weight", 0, 7)
    with pytest.raises(UserError, match="holds 2 of 4 elements of weight b: the checkpoint is incomplete"):
        reader.read("b", "weight", 3, 4)
    assert torch.equal(reader.read("b", "weight", 5, 2), whole[5:])


@pytest.mark.parametrize("name", ["chmod", "fsync"])
def test_a_file_system_without_chmod_or_without_a_sync_of_folders_holds_checkpoints(name, tmp_path, monkeypatch):
    """EPERM of S3, blobfuse, CIFS and NTFS; EINVAL of older CIFS and some FUSE."""
    real, refused = getattr(os, name), []

    def without(target, *arguments, **options):
        if name == "fsync" and not os.path.isdir(f"/proc/self/fd/{target}"):
            return real(target, *arguments, **options)
        refused.append(target)
        raise OSError(errno.EPERM if name == "chmod" else errno.EINVAL, "refused")

    monkeypatch.setattr(os, name, without)
    save(tmp_path / "run", 3)
    write_weights(tmp_path / "whole", {"b": torch.zeros(7)}, {"config": {}})
    with atomic_writer(tmp_path / "list.tsv") as stream:
        stream.write("text")
    assert len(refused) >= 2
    assert verify(tmp_path / "run" / "step-00000003") is None and verify(tmp_path / "whole") is None
    assert (tmp_path / "list.tsv").read_text() == "text"
    monkeypatch.setattr(os, name, failing(errno.EIO))
    with pytest.raises(OSError, match="really"):
        write_weights(tmp_path / "second", {"b": torch.zeros(7)}, {"config": {}})


def failing(number):
    def call(*_, **__):
        raise OSError(number, "really")

    return call


def test_another_architecture_is_named(tmp_path):
    save(tmp_path, 1)
    reader = CheckpointReader(tmp_path / "step-00000001")
    with pytest.raises(UserError, match="another architecture: a.weight is 4x5 there and 4x6 here"):
        reader.require_same_model({"a.weight": (4, 6), "b": (1, 1, 7)})
    with pytest.raises(UserError, match="b is 1x1x7 there and absent here"):
        reader.require_same_model({"a.weight": (4, 5)})


def test_a_failed_save_leaves_the_earlier_ones(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".step-00000002.beef.partial").write_text("a file where the folder should be")
    writer = CheckpointWriter(tmp_path, ranks(), keep=1)
    writer._token = "beef"
    writer.save(2, fragments(values(2)), state(2))
    writer.wait()
    published, failure = writer.poll()
    assert published is None
    assert "the checkpoint of step 2 was not written" in failure
    assert find_newest_good(tmp_path) == (tmp_path / "step-00000001", [])


def test_a_thread_that_cannot_begin_is_not_waited_for(tmp_path, monkeypatch):
    """Where memory has run out, the error that says so is not covered by another one."""
    writer = CheckpointWriter(tmp_path, ranks(), keep=0)

    def refuse(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", refuse)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        writer.save(1, [], {})
    writer.wait()
