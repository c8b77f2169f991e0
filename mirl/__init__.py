"""Masked Image Residual Learning: the Python face of the engine.

    import mirl

    model = mirl.load_pretrained("runs/demo")
    config = mirl.recipe("vit_b_48_300")
    mirl.pretrain(config)

Importing this package costs no torch: each name below is imported on first use. `docs/python.md` shows them at work.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent
if not (_HERE / "engine").is_dir():
    # In a checkout engine/, kernels/, dataloaders/ and ds_configs/ stand beside this folder; a wheel has them inside.
    __path__.append(str(_HERE.parent))
    # The checkout goes behind everything else, so that `import kernels` still finds Hugging Face's package.
    sys.path.sort(key=lambda entry: os.path.realpath(entry or os.curdir) == str(_HERE.parent))
