"""Pre-train a Vision Transformer by Masked Image Residual Learning.

    deepspeed engine/pretrain.py --deepspeed_config ds_configs/zero2.json [--recipe NAME] [--data PATH ...] [flags]

Also: torchrun engine/pretrain.py, srun python engine/pretrain.py, python -m mirl.engine.pretrain, mirl pretrain, or
plain python. Without --data it trains on the demo photographs. --help lists every flag.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if not __package__:
    # Run as a file, engine/ is first on sys.path, where its modules would shadow others. The checkout takes its place,
    # and goes behind everything else when `mirl` is imported.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

# OpenMP reads the variable once, when torch loads it. PASSIVE lets waiting threads sleep instead of spin. On a CPU they
# share the cores with the threads that decode images, and spinning makes a step several times slower
# (benchmarks/LOG.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from mirl.engine.distributed import stop_request  # noqa: E402, F401 - notes who started this process
from mirl.engine.distributed.environment import hide_gpus  # noqa: E402
from mirl.engine.errors import run_entry_point  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    """Parse ``argv`` (default: the command line) and run; return the exit code."""
    from mirl.engine.pretraining.command_line import parse_pretrain

    config = parse_pretrain(sys.argv[1:] if argv is None else argv)
    hide_gpus(config.run.device)
    # This imports torch, DeepSpeed and DALI, so it comes late: --help and a wrong flag answer at once.
    from mirl.engine.pretraining.run import pretrain

    pretrain(config)
    return 0


if __name__ == "__main__":
    run_entry_point(main)
