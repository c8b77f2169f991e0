"""Which image size a step of a run has, and what the step costs beside one of the whole size."""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mirl.engine.accounting.flops import training_flops_per_image
from mirl.engine.configuration.config import PretrainConfig
from mirl.engine.configuration.image_sizes import read_stages
from mirl.engine.models.config import ModelConfig
from mirl.engine.models.skips import ExactSkips


@dataclass(frozen=True)
class StepSizes:
    """The sizes follow from settings and length alone, so that every rank, and a resumed run, has the same.

    firsts: the first step of each stage, from 0. models: the model's configuration in it. Both are empty where all
    steps have one size. total_steps: of the run.
    """

    firsts: tuple[int, ...]
    models: tuple[ModelConfig, ...]
    total_steps: int

    @classmethod
    def of(cls, config: Any, total_steps: int) -> StepSizes:
        """Make those of a run of any kind; only pre-training has image sizes.

        A stage begins with the first step that has ``share`` of the run behind it. The last step has the whole size,
        however short the run is; a stage that no step is left for is passed over.
        """
        stages = read_stages(config.data.image_sizes) if isinstance(config, PretrainConfig) else ()
        begins = [min(math.ceil(stage.share * total_steps), total_steps - 1) for stage in stages]
        kept = [i for i, first in enumerate(begins) if i + 1 == len(begins) or first < begins[i + 1]]
        if len(kept) < 2:
            return cls((), (), total_steps)
        models = [
            dataclasses.replace(config.model, image_height=stages[i].height, image_width=stages[i].width) for i in kept
        ]
        return cls(tuple(begins[i] for i in kept), tuple(models), total_steps)

    def __bool__(self) -> bool:
        return bool(self.firsts)

    def model_at(self, step: int) -> ModelConfig:
        """Return the configuration of the model in ``step``, counted from 0; only where there are stages."""
        return self.models[self._stage(step)]

    def size_at(self, step: int) -> tuple[int, int]:
        """Return (height, width) of the images of ``step``, counted from 0; only where there are stages."""
        model = self.model_at(step)
        return model.image_height, model.image_width

    def sizes_from(self, step: int) -> list[tuple[int, int]]:
        """List the sizes of ``step`` and of all later ones, each once; nothing where all steps have one size."""
        models = self.models[self._stage(step) :] if self else ()
        return list(dict.fromkeys((model.image_height, model.image_width) for model in models))

    def cost(self, step: int, *, plain: bool = False) -> float:
        """Count the FLOPs of ``step`` as a share of those of a step of the whole size.

        plain: without the exact skips.
        """
        return self._costs[plain][self._stage(step)] if self else 1.0

    def cost_between(self, first: int, last: int) -> float:
        """Add up `cost` over steps ``first`` to ``last`` - 1."""
        if not self:
            return float(max(0, last - first))
        return sum(
            max(0, min(last, end) - max(first, begin)) * cost
            for (_, begin, end), cost in zip(self._stages(), self._costs[False], strict=True)
        )

    @property
    def mean_cost(self) -> float:
        """Average `cost` over the run."""
        return self.cost_between(0, self.total_steps) / self.total_steps

    def shares(self) -> list[tuple[ModelConfig, float]]:
        """List the configuration of each stage, with the share of the steps that have it; nothing without stages."""
        return [(model, (end - begin) / self.total_steps) for model, begin, end in self._stages()]

    def __str__(self) -> str:
        """Write what the log says: "112x112 in steps 1 to 300, 224x224 in steps 301 to 600"."""
        return ", ".join(
            f"{model.image_height}x{model.image_width} in steps {begin + 1} to {end}"
            for model, begin, end in self._stages()
        )

    def _stages(self) -> list[tuple[ModelConfig, int, int]]:
        """Each stage with its first step and the one after its last."""
        ends = (*self.firsts[1:], self.total_steps)[: len(self.firsts)]  # none where there are no stages
        return list(zip(self.models, self.firsts, ends, strict=True))

    def _stage(self, step: int) -> int:
        return max(0, bisect_right(self.firsts, step) - 1)

    @cached_property
    def _costs(self) -> dict[bool, list[float]]:
        costs = {}
        for plain, skips in ((False, (ExactSkips(),)), (True, ())):
            flops = [training_flops_per_image(model, *skips) for model in self.models]
            costs[plain] = [value / flops[-1] for value in flops]
        return costs
