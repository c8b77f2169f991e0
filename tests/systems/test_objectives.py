"""Every objective trains under ZeRO-2 in bf16 on two ranks, and a resumed run is the uninterrupted one to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchvision.models import vgg16

from mirl.engine.checkpoints.reader import CheckpointReader
from tests.support.runs import equal_tensors, losses

SYSTEMS = {
    "mirl": [],
    "mirl, release": ["--variant", "release"],
    "mirl without DID": ["--no-did"],
    "G = 1": ["--segments", "1"],
    "G = L": ["--segments", "4"],
    "mae": ["--objective", "mae", "--segments", "1", "--no-did", "--decoder-depth", "2"],
    "truncated": ["--objective", "truncated", "--truncated-depth", "2", "--segments", "1", "--no-did"],
    "multi_decoder": ["--objective", "multi_decoder"],
    "coarse_to_fine": ["--objective", "coarse_to_fine"],
    "fine_to_coarse": ["--objective", "fine_to_coarse"],
    "feature loss": ["--feature-loss", "0.5"],
    "VGG loss": ["--vgg-loss", "0.1"],
}
STEPS = 6


@pytest.fixture(scope="session")
def vgg_file(tmp_path_factory) -> Path:
    """A file as torchvision names its weights; random ones do for training."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    state = vgg16(weights=None).features.state_dict()
    torch.save({f"features.{key}": value for key, value in state.items()}, path)
    return path


@pytest.mark.parametrize("name", SYSTEMS)
def test_trains_and_resumes(name, server, photographs, vgg_file, tmp_path):
    flags = [*SYSTEMS[name], *(["--vgg-weights", vgg_file] if name == "VGG loss" else [])]
    common = ["--data", photographs, "--steps", STEPS, "--lr", "2e-3", "--warmup-steps", 1, "--checkpoint-every", 3]
    common += ["--precision", "bf16", "--deepspeed_config", "zero2", "--keep-checkpoints", 0, *flags]
    # In six steps; heads that begin at zero begin with the loss of the mean, which takes longer to leave behind.
    common += ["--head-init", "xavier"]
    whole = server.start(tmp_path, *common, "--out", "whole")
    assert whole.end(90) == [0, 0], whole.output()[-3000:]
    first = losses(tmp_path / "whole")
    assert len(first) == STEPS and first[STEPS] < first[1]
    resumed = server.start(tmp_path, *common, "--out", "resumed", "--resume", "whole/checkpoints/step-00000003")
    assert resumed.end(90) == [0, 0], resumed.output()[-3000:]
    second = losses(tmp_path / "resumed")
    assert sorted(second) == [4, 5, 6]
    assert second == {step: first[step] for step in second}
    last = f"checkpoints/step-{STEPS:08d}"
    assert equal_tensors(tmp_path / "whole" / last, tmp_path / "resumed" / last)
    if name == "feature loss":
        one, other = (CheckpointReader(tmp_path / run / last) for run in ("whole", "resumed"))
        key, numel = "encoder.blocks.1.mlp.fc1.weight", 32 * 128
        teacher = one.read(key, "teacher", 0, numel)
        assert torch.equal(teacher, other.read(key, "teacher", 0, numel))
        assert not torch.equal(teacher, one.read(key, "weight", 0, numel))  # it lags behind


def test_teacher_needs_whole_weights(server, photographs, tmp_path):
    run = server.start(
        tmp_path, "--data", photographs, "--steps", 2, "--feature-loss", "1", "--deepspeed_config", "zero3", ranks=1
    )
    assert run.end(60) == [2]
    assert "use --deepspeed_config zero2" in run.output()
