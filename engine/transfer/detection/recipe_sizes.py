"""Each detection recipe takes these pixels, batch, and estimated memory on three machines of one rank.

`tests/engine/test_recipe_sizes.py` holds each text equal to the estimate, which needs torch; the help does not.
"""

from __future__ import annotations

SIZES: dict[str, str] = {
    "small_data": (
        "up to 480x640, batch 8; estimated memory for vit_s, 80 classes: CPU with 16 GB 7.1 GiB at micro-batch 2, GPU "
        "of 8 GB 4.3 GiB at micro-batch 2, GPU of 80 GB 11.7 GiB at micro-batch 8"
    ),
    "demo": (
        "up to 96x96, batch 8; estimated memory for demo, 80 classes: CPU with 16 GB 1.5 GiB at micro-batch 8, GPU of 8"
        " GB 1.2 GiB at micro-batch 8, GPU of 80 GB 1.2 GiB at micro-batch 8"
    ),
    "vit_b": (
        "up to 800x1333, batch 32; estimated memory for vit_b, 80 classes: CPU with 16 GB 9.0 GiB at micro-batch 1, GPU"
        " of 8 GB 6.0 GiB at micro-batch 1, GPU of 80 GB 49.2 GiB at micro-batch 16"
    ),
    "vit_s_54": (
        "up to 800x1333, batch 32; estimated memory for vit_s_54, 80 classes: CPU with 16 GB 11.8 GiB at micro-batch 1,"
        " GPU of 8 GB too small, 7.5 GiB at micro-batch 1, GPU of 80 GB 38.0 GiB at micro-batch 8"
    ),
    "vit_b_24": (
        "up to 800x1333, batch 32; estimated memory for vit_b_24, 80 classes: CPU with 16 GB too small, 13.9 GiB at "
        "micro-batch 1, GPU of 8 GB too small, 8.8 GiB at micro-batch 1, GPU of 80 GB 37.9 GiB at micro-batch 8"
    ),
    "vit_b_48": (
        "up to 800x1333, batch 32; estimated memory for vit_b_48, 80 classes: CPU with 16 GB too small, 23.6 GiB at "
        "micro-batch 1, GPU of 8 GB too small, 14.5 GiB at micro-batch 1, GPU of 80 GB 61.4 GiB at micro-batch 8"
    ),
    "vitdet_b": (
        "up to 1024x1024, batch 64; estimated memory for vit_b, 80 classes: CPU with 16 GB 8.9 GiB at micro-batch 1, "
        "GPU of 8 GB 6.1 GiB at micro-batch 1, GPU of 80 GB 52.1 GiB at micro-batch 16"
    ),
}
