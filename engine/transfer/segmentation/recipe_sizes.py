"""Each segmentation recipe takes these pixels, batch, and estimated memory on three machines of one rank.

`tests/engine/test_recipe_sizes.py` holds each text equal to the estimate, which needs torch; the help does not.
"""

from __future__ import annotations

SIZES: dict[str, str] = {
    "small_data": (
        "pixels of pre-training, batch 8; estimated memory for vit_s at 224x224, 150 classes: CPU with 16 GB 4.8 GiB at"
        " micro-batch 8, GPU of 8 GB 3.3 GiB at micro-batch 8, GPU of 80 GB 3.3 GiB at micro-batch 8"
    ),
    "demo": (
        "crops of 96x96, batch 8; estimated memory for demo at 96x96, 150 classes: CPU with 16 GB 1.6 GiB at "
        "micro-batch 8, GPU of 8 GB 1.3 GiB at micro-batch 8, GPU of 80 GB 1.3 GiB at micro-batch 8"
    ),
    "vit_b": (
        "crops of 512x512, batch 16; estimated memory for vit_b at 512x512, 150 classes: CPU with 16 GB 11.3 GiB at "
        "micro-batch 2, GPU of 8 GB 7.0 GiB at micro-batch 2, GPU of 80 GB 27.4 GiB at micro-batch 16"
    ),
    "vit_s_54": (
        "crops of 512x512, batch 16; estimated memory for vit_s_54 at 512x512, 150 classes: CPU with 16 GB too small, "
        "14.5 GiB at micro-batch 2, GPU of 8 GB 6.4 GiB at micro-batch 2, GPU of 80 GB 28.7 GiB at micro-batch 16"
    ),
    "vit_b_24": (
        "crops of 512x512, batch 16; estimated memory for vit_b_24 at 512x512, 150 classes: CPU with 16 GB too small, "
        "16.1 GiB at micro-batch 2, GPU of 8 GB too small, 9.1 GiB at micro-batch 2, GPU of 80 GB 33.7 GiB at "
        "micro-batch 16"
    ),
    "vit_b_48": (
        "crops of 512x512, batch 16; estimated memory for vit_b_48 at 512x512, 150 classes: CPU with 16 GB too small, "
        "25.7 GiB at micro-batch 2, GPU of 8 GB too small, 13.5 GiB at micro-batch 2, GPU of 80 GB 46.4 GiB at "
        "micro-batch 16"
    ),
}
