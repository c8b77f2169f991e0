"""Make matrices nearly orthogonal by Newton-Schulz iterations, as Muon does with its updates.

Letters: K matrices of one shape, M rows, N columns. For x = U S V^T the result is close to U V^T: five steps of the
quintic below bring each singular value into 0.68 ... 1.13, unless it was below about a thousandth of the largest. The
quintic's coefficients were chosen for the steepest slope at zero, not for convergence to 1 (Jordan et al., Muon, 2024;
`torch.optim.Muon` has the same numbers).

The code is plain torch: a step is three batched matrix products on the smaller side of the matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
EPS = 1e-7


def orthogonalise(x_KMN: Tensor, *, steps: int = STEPS) -> Tensor:
    """Return the K matrices of ``x_KMN`` with their singular values brought near to 1; [K, M, N] in the dtype given.

    A matrix of zeros stays a matrix of zeros. bfloat16 is enough for an update, and `torch.optim.Muon` computes in it.
    """
    a, b, c = COEFFICIENTS
    tall = x_KMN.shape[1] > x_KMN.shape[2]
    y = x_KMN.mT if tall else x_KMN
    # The Frobenius norm bounds the largest singular value.
    y = y / torch.linalg.vector_norm(y, dim=(1, 2), keepdim=True).clamp(min=EPS)
    for _ in range(steps):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.mT if tall else y
