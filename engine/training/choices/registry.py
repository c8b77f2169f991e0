"""All choices of a run, in the order in which they are measured. A new one is one more declaration in this list."""

from __future__ import annotations

from mirl.engine.training.choices.attention import ATTENTION
from mirl.engine.training.choices.declaration import Choice
from mirl.engine.training.choices.optimizer import OPTIMIZER
from mirl.engine.training.choices.pointwise import BIAS, GELU, NORM

CHOICES: tuple[Choice, ...] = (OPTIMIZER, ATTENTION, NORM, BIAS, GELU)
