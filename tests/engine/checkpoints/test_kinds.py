"""What is said of a checkpoint."""

from __future__ import annotations

import dataclasses

from mirl.engine.checkpoints.kinds import describe
from mirl.engine.models.config import model_config


def test_a_model_with_changed_fields_is_not_called_by_the_name_of_its_size():
    def told(model: dict) -> str:
        return describe({"config": {"model": model, "recipe": "x"}, "parameters": {"decoders.0.mask_token": [8]}})

    assert told(dataclasses.asdict(model_config("vit_s"))).endswith("(vit_s)")
    assert "(custom (vit_s, depth 12 -> 4))" in told(dataclasses.asdict(model_config("vit_s", depth=4)))
    # Written by a version with other fields: its own name is all that can be said.
    assert told({"name": "vit_s", "depth": 4, "of_tomorrow": 1}).endswith("(vit_s)")
    assert told({"name": "vit_s", "depth": 7}).endswith("(vit_s)")
