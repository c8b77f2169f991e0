"""Train a detector with masks, Mask R-CNN on a pre-trained encoder, end to end.

    deepspeed engine/detect.py --checkpoint RUN --data DIR --annotations FILE [--recipe NAME] [flags]

Also: torchrun engine/detect.py, srun python engine/detect.py, python -m mirl.engine.detect, mirl detect, or plain
python. --help lists every flag; --demo needs no data.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if not __package__:
    # Run as a file, engine/ is first on sys.path, where its modules would shadow others. The checkout takes its place,
    # and goes behind everything else when `mirl` is imported.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded; see engine/pretrain.py

from mirl.engine.distributed import stop_request  # noqa: E402, F401 - notes who started this process
from mirl.engine.distributed.environment import hide_gpus  # noqa: E402
from mirl.engine.errors import run_entry_point  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    """Parse ``argv`` (default: the command line) and run; return the exit code."""
    from mirl.engine.configuration.flags import parse
    from mirl.engine.transfer.detection.command_line import DETECT

    given = sys.argv[1:] if argv is None else argv
    config = parse(DETECT, [part for word in given for part in (["--recipe", "demo"] if word == "--demo" else [word])])
    from mirl.engine.transfer.detection.early import refuse_early, with_demo

    config = with_demo(config)
    refuse_early(config)
    hide_gpus(config.run.device)
    # This imports torch, torchvision and DeepSpeed, so it comes late: --help and a wrong flag or path answer at once.
    from mirl.engine.transfer.detection.run import detect

    detect(config)
    return 0


if __name__ == "__main__":
    run_entry_point(main)
