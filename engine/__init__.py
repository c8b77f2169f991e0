"""This package is the training engine: models, entry points, loop, DeepSpeed wiring.

`mirl.engine.models` builds the model of the paper.
"""

from mirl.engine.version import __version__ as __version__
