"""Train a segmenter, UperNet on a pre-trained encoder, end to end.

    deepspeed engine/segment.py --checkpoint RUN --data images/ --labels labels/ [--recipe NAME] [flags]

Also: torchrun engine/segment.py, srun python engine/segment.py, python -m mirl.engine.segment, mirl segment, or
plain python. --help lists every flag.
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
    argv = sys.argv[1:] if argv is None else argv
    if "--demo" in argv:
        from mirl.engine.transfer.segmentation.demo import run_demo

        return run_demo([argument for argument in argv if argument != "--demo"])
    from mirl.engine.configuration.flags import parse
    from mirl.engine.transfer.segmentation.command_line import SEGMENT

    config = parse(SEGMENT, argv)
    from mirl.engine.transfer.segmentation.early import refuse_early

    refuse_early(config)
    hide_gpus(config.run.device)
    # This imports torch, DeepSpeed and DALI, so it comes late: --help and a wrong flag or path answer at once.
    from mirl.engine.transfer.segmentation.run import segment

    segment(config)
    return 0


if __name__ == "__main__":
    run_entry_point(main)
