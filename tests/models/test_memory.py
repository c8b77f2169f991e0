"""The memory formulas against the tensors that autograd really keeps, and the printed summary."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.flops import pretraining_parameters
from engine.memory import activation_bytes, state_bytes, step_gib
from engine.models import MIRL, MODEL_NAMES, Execution, ModelConfig, model_config
from engine.summary import run_summary, summarise
from tests.models.helpers import make_inputs

PLAIN = Execution()


def config_of(**overrides: Any) -> ModelConfig:
    base = dict(
        depth=6, width=96, heads=3, segments=2, decoder_width=64, decoder_heads=2,
        image_height=128, image_width=128, attention="sdpa",
    )  # fmt: skip
    return ModelConfig(**(base | overrides))


def kept_bytes(config: ModelConfig, mode: str | int, batch: int, execution: Execution = PLAIN) -> int:
    """Bytes of all storages that the graph of one forward pass in bfloat16 holds, the model's own left out."""
    model = MIRL(config).bfloat16()
    model.set_activation_checkpointing(mode)
    model.set_execution(execution)
    images, noise = make_inputs(config, batch)
    model(images, noise=noise)  # resolves attention, which runs some
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in own:
            kept[pointer] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(images, noise=noise)
    assert output.loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def kept_bytes_per_image(config: ModelConfig, mode: str | int = "none") -> float:
    """The difference of two batch sizes: folded matrices and tables do not grow with the batch."""
    return (kept_bytes(config, mode, 12) - kept_bytes(config, mode, 4)) / 8


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"variant": "release"},
        {"variant": "release", "decoder_depth": 1},
        {"did": False},
        {"segments": 6, "decoder_depth": 3, "mlp_ratio": 3.0},
        {"objective": "multi_decoder"},
        {"objective": "mae", "segments": 1, "did": False, "decoder_depth": 3},
    ],
    ids=str,
)
def test_activations_are_those_that_autograd_keeps(overrides: dict[str, Any]) -> None:
    config = config_of(**overrides)
    # On a CPU the gradient of the predictions is kept in float32, on a GPU in the dtype of the predictions.
    terms = len(MIRL(config).terms)
    cpu_only = 2 * terms * config.num_masked * config.patch_pixels
    pixels = config.image_height * config.image_width * config.channels
    expected = activation_bytes(config, 1) - pixels + cpu_only
    # Ids and the odd statistic are not in the formula.
    assert kept_bytes_per_image(config) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("mode", ["every", 2, "segments"])
def test_checkpointing_keeps_no_more_than_estimated(mode: str | int) -> None:
    """The estimate includes the inside of the run that is being recomputed, which the forward pass does not keep."""
    config = config_of(depth=12, segments=2)
    kept = kept_bytes_per_image(config, mode)
    assert kept < activation_bytes(config, 1, mode) < 0.7 * activation_bytes(config, 1, "none")


def test_states_by_stage() -> None:
    config = model_config("vit_b_48")
    per_parameter = [state_bytes(config, stage, 8) / pretraining_parameters(config) for stage in range(4)]
    assert per_parameter == [20, 2 + 6 + 12 / 8, 2 + (6 + 12) / 8, 20 / 8]
    assert state_bytes(config, 3, 1) == state_bytes(config, 0, 1)


def test_target_of_the_design() -> None:
    """B-48, batch 256, no recomputation, ZeRO over 8 ranks: within the 28 GB (26.1 GiB) planned, 1 GiB either way."""
    assert step_gib(model_config("vit_b_48"), 256, zero_stage=2, ranks=8) == pytest.approx(26.1, abs=1)


@pytest.mark.parametrize(("stage", "ranks", "message"), [(4, 1, "zero_stage is 4"), (2, 0, "ranks is 0")])
def test_bad_states(stage: int, ranks: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        state_bytes(model_config("vit_b"), stage, ranks)


def test_summary_of_all_sizes() -> None:
    text = run_summary()
    rows = {tuple(line.split()[:2]): line.split() for line in text.split("\n\n")[0].splitlines()[1:]}
    assert rows.keys() == {(name, variant) for name in MODEL_NAMES for variant in ("paper", "release")}
    assert rows["vit_b_48", "paper"][2:] == ["341.7", "67.0", "340.8", "+", "49.3", "162.9", "152.6"]
    assert max(map(len, text.splitlines())) <= 120


def test_summary_as_json_has_the_same_figures() -> None:
    rows = json.loads(run_summary("vit_b_48", as_json=True))
    assert rows == summarise("vit_b_48")
    assert [row["variant"] for row in rows] == ["paper", "release"]
    assert rows[1]["train_gflop"] == pytest.approx(171.2, abs=0.05)
    assert rows[0]["memory_gib"]["zero2"]["none"]["64"] < rows[0]["memory_gib"]["zero2"]["none"]["128"]


def test_summary_of_one_size_shows_every_stage() -> None:
    text = run_summary("vit_s")
    assert text.count("zero3") == 4 and "vit_b" not in text


def test_summary_of_an_unknown_size() -> None:
    with pytest.raises(ValueError, match="did you mean 'vit_b'"):
        run_summary("vitb")
