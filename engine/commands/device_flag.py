"""Commands of one process have --device as runs have it.

So a GPU which torch cannot use is no silent way to the CPU.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from mirl.engine.distributed.environment import hide_gpus

if TYPE_CHECKING:
    import torch


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add --device, as runs have it."""
    parser.add_argument(
        "--device", choices=("auto", "cpu"), default="auto", help="auto: a GPU where there is one [auto]"
    )


def device_of_process(asked: str) -> torch.device:
    """Return the GPU or the CPU for a command of one process, by its --device; see `choose_device`.

    Raises:
        UserError: the machine has a GPU that torch cannot use, and ``asked`` is not "cpu".
    """
    hide_gpus(asked)
    # This imports torch, so it comes late: a command tells a wrong flag before.
    from mirl.engine.distributed.device import choose_device

    return choose_device(asked)
