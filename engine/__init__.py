"""The training engine: models, entry points, loop, DeepSpeed wiring. `engine.models` builds the model of the paper."""

from engine.version import __version__ as __version__
