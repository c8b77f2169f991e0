"""Import Triton in this one place, so that `import mirl.kernels` also works if Triton is not installed.

`triton` and `tl` are the real modules, or stand-ins under which the kernel files still import: a kernel decorated by
the stand-in raises a UserError that names the pip line when it is launched, never before.
"""

import os
from types import SimpleNamespace

from mirl.errors import UserError

INSTALL_LINE = "pip install triton (Linux; every CUDA build of torch already brings the Triton it was built with)"


class _MissingKernel:
    def __init__(self, fn):
        self.__name__ = fn.__name__

    def __getitem__(self, grid):
        raise UserError(f"{self.__name__} is a Triton kernel and triton is not installed: {INSTALL_LINE}")


try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
    TRITON_VERSION: str = triton.__version__
except ImportError:
    HAS_TRITON = False
    TRITON_VERSION = "none"
    triton = SimpleNamespace(jit=_MissingKernel)
    tl = SimpleNamespace(constexpr=int)

# Triton reads the variable when a kernel is decorated, so it has to be set before `mirl.kernels` is imported.
INTERPRETED: bool = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0") == "1"

__all__ = ["HAS_TRITON", "INTERPRETED", "TRITON_VERSION", "tl", "triton"]
