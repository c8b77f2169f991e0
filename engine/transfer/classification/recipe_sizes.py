"""Each fine-tuning recipe takes these pixels, batch, and estimated memory on three machines of one rank.

`tests/engine/test_recipe_sizes.py` holds each text equal to the estimate, which needs torch; the help does not.
"""

from __future__ import annotations

SIZES: dict[str, str] = {
    "small_data": (
        "pixels of pre-training, batch 32; estimated memory for vit_s at 224x224: CPU with 16 GB 5.0 GiB at micro-batch"
        " 32, GPU of 8 GB 2.6 GiB at micro-batch 32, GPU of 80 GB 2.6 GiB at micro-batch 32"
    ),
    "vit_b_48": (
        "pixels of pre-training, batch 2048; estimated memory for vit_b_48 at 224x224: CPU with 16 GB too small, 16.4 "
        "GiB at micro-batch 2, GPU of 8 GB too small, 9.9 GiB at micro-batch 2, GPU of 80 GB 40.8 GiB at micro-batch "
        "128"
    ),
    "vit_s_54": (
        "pixels of pre-training, batch 2048; estimated memory for vit_s_54 at 224x224: CPU with 16 GB 6.8 GiB at "
        "micro-batch 4, GPU of 8 GB 5.6 GiB at micro-batch 16, GPU of 80 GB 39.2 GiB at micro-batch 256"
    ),
}
