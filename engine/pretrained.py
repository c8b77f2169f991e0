"""A model from a checkpoint of this engine, in one call and without a process group."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.checkpoint_reader import CheckpointReader, locate
from engine.config import section_from_dict
from engine.models import MIRL, ModelConfig


def load_pretrained(path: Path | str, *, device: torch.device | str = "cpu") -> MIRL:
    """The whole model (encoder and decoders, fp32, in eval mode) of a checkpoint or of a run's newest good checkpoint.

    Every weight must be there: a checkpoint that lacks the decoders is refused, because its reconstructions would be
    noise.

    Raises:
        UserError: no checkpoint at ``path``, a damaged or an incomplete one.

    >>> model = load_pretrained("runs/demo")                                     # doctest: +SKIP
    >>> output = model(images, noise=torch.rand(len(images), 144), full=True)    # doctest: +SKIP
    """
    found = locate(Path(path))
    reader = CheckpointReader(found)
    config = section_from_dict(ModelConfig, reader.state["config"]["model"], source=str(found / "state.json"))
    model = MIRL(config)
    reader.require_same_model({name: tuple(parameter.shape) for name, parameter in model.named_parameters()})
    model.load_state_dict(reader.weights(), strict=True)
    return model.to(device).eval()
