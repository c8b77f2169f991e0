"""What each recipe takes: pixels, batch, and estimated memory on three machines of one rank.

`tests/engine/test_recipe_sizes.py` holds each text equal to the estimate, which needs torch; the help does not.
"""

from __future__ import annotations

SIZES: dict[str, str] = {
    "demo": (
        "64x64 pixels, batch 32; estimated memory: CPU with 16 GB 1.4 GiB at micro-batch 32, GPU of 8 GB 1.2 GiB at "
        "micro-batch 32, GPU of 80 GB 1.2 GiB at micro-batch 32"
    ),
    "tiny": (
        "64x64 pixels, batch 32; estimated memory: CPU with 16 GB 1.4 GiB at micro-batch 32, GPU of 8 GB 1.2 GiB at "
        "micro-batch 32, GPU of 80 GB 1.2 GiB at micro-batch 32"
    ),
    "small_data": (
        "224x224 pixels, batch 512; estimated memory: CPU with 16 GB 5.4 GiB at micro-batch 64, GPU of 8 GB 4.4 GiB at "
        "micro-batch 128, GPU of 80 GB 12.9 GiB at micro-batch 512"
    ),
    "fast": (
        "224x224 pixels, batch 4096; estimated memory: CPU with 16 GB 6.8 GiB at micro-batch 32, GPU of 8 GB "
        "5.0 GiB at micro-batch 64, GPU of 80 GB 37.4 GiB at micro-batch 1024"
    ),
    "vit_s_300": (
        "224x224 pixels, batch 4096; estimated memory: CPU with 16 GB 5.4 GiB at micro-batch 64, GPU of 8 GB 4.4 GiB at"
        " micro-batch 128, GPU of 80 GB 47.0 GiB at micro-batch 2048"
    ),
    "vit_s_800": (
        "224x224 pixels, batch 4096; estimated memory: CPU with 16 GB 5.4 GiB at micro-batch 64, GPU of 8 GB 4.4 GiB at"
        " micro-batch 128, GPU of 80 GB 47.0 GiB at micro-batch 2048"
    ),
    "vit_b_300": (
        "224x224 pixels, batch 4096; estimated memory: CPU with 16 GB 6.8 GiB at micro-batch 32, GPU of 8 GB 5.0 GiB at"
        " micro-batch 64, GPU of 80 GB 37.4 GiB at micro-batch 1024"
    ),
    "vit_b_800": (
        "224x224 pixels, batch 4096; estimated memory: CPU with 16 GB 6.8 GiB at micro-batch 32, GPU of 8 GB 5.0 GiB at"
        " micro-batch 64, GPU of 80 GB 37.4 GiB at micro-batch 1024"
    ),
    "vit_l_300": (
        "224x224 pixels, batch 4096; estimated memory: CPU with 16 GB 10.8 GiB at micro-batch 1, GPU of 8 GB 7.0 GiB at"
        " micro-batch 1, GPU of 80 GB 67.4 GiB at micro-batch 1024"
    ),
    "vit_l_800": (
        "224x224 pixels, batch 4096; estimated memory: CPU with 16 GB 10.8 GiB at micro-batch 1, GPU of 8 GB 7.0 GiB at"
        " micro-batch 1, GPU of 80 GB 67.4 GiB at micro-batch 1024"
    ),
    "vit_s_54_300": (
        "224x224 pixels, batch 4096; estimated memory: CPU with 16 GB 6.4 GiB at micro-batch 8, GPU of 8 GB 5.6 GiB at "
        "micro-batch 32, GPU of 80 GB 40.5 GiB at micro-batch 512"
    ),
    "vit_s_54_800": (
        "224x224 pixels, batch 4096; estimated memory: CPU with 16 GB 6.4 GiB at micro-batch 8, GPU of 8 GB 5.6 GiB at "
        "micro-batch 32, GPU of 80 GB 40.5 GiB at micro-batch 512"
    ),
    "vit_b_24_300": (
        "224x224 pixels, batch 4096; estimated memory: CPU with 16 GB 9.8 GiB at micro-batch 16, GPU of 8 GB 5.8 GiB at"
        " micro-batch 16, GPU of 80 GB 37.8 GiB at micro-batch 512"
    ),
    "vit_b_24_800": (
        "224x224 pixels, batch 4096; estimated memory: CPU with 16 GB 9.8 GiB at micro-batch 16, GPU of 8 GB 5.8 GiB at"
        " micro-batch 16, GPU of 80 GB 37.8 GiB at micro-batch 512"
    ),
    "vit_b_48_300": (
        "224x224 pixels, batch 4096; estimated memory: CPU with 16 GB too small, 13.0 GiB at micro-batch 1, GPU of 8 GB"
        " too small, 8.3 GiB at micro-batch 1, GPU of 80 GB 64.9 GiB at micro-batch 512"
    ),
    "vit_b_48_800": (
        "224x224 pixels, batch 4096; estimated memory: CPU with 16 GB too small, 13.0 GiB at micro-batch 1, GPU of 8 GB"
        " too small, 8.3 GiB at micro-batch 1, GPU of 80 GB 64.9 GiB at micro-batch 512"
    ),
}
