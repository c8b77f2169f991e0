"""Fine-tune a pre-trained encoder as a classifier, end to end.

    deepspeed engine/finetune.py --checkpoint RUN --data train/ --val val/ [--recipe NAME] [flags]

Also: torchrun engine/finetune.py, srun python engine/finetune.py, python -m engine.finetune, mirl finetune, or plain
python. --help lists every flag.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if not __package__:
    # Run as a file, engine/ is first on sys.path, where its modules would shadow others; the checkout belongs there.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded; see engine/pretrain.py

from engine import stop_request  # noqa: E402, F401 - notes who started this process before anything slow is imported
from engine.errors import run_entry_point  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    """Parse ``argv`` (default: the command line) and run; returns the exit code."""
    from engine.finetuning.command_line import FINETUNE
    from engine.flags import parse

    config = parse(FINETUNE, sys.argv[1:] if argv is None else argv)
    # Only now, so that --help and a wrong flag answer at once: these import torch, DeepSpeed and DALI.
    from engine.finetuning.finetune_run import finetune

    finetune(config)
    return 0


if __name__ == "__main__":
    run_entry_point(main)
