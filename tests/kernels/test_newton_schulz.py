"""Newton-Schulz iterations against a singular value decomposition in float64, and against torch's Muon."""

from __future__ import annotations

import pytest
import torch

from mirl.kernels.newton_schulz import orthogonalise

SHAPES = [(48, 48), (144, 48), (32, 96), (1, 7)]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_directions_stay_and_singular_values_come_near_to_one(rows, columns):
    generator = torch.Generator().manual_seed(0)
    x_KMN = torch.randn(3, rows, columns, generator=generator, dtype=torch.float64)
    x_KMN[1] *= 1e-6  # the scale of a matrix says nothing
    u, s, vh = torch.linalg.svd(x_KMN, full_matrices=False)
    # A square random matrix has singular values near to 0, which five steps do not reach.
    seen = s > 0.02 * s[:, :1]
    found = u.mT @ orthogonalise(x_KMN) @ vh.mT
    values = found.diagonal(dim1=1, dim2=2)
    assert bool(((values > 0.65) & (values < 1.25))[seen].all())
    assert (found - torch.diag_embed(values)).abs().max() < 1e-9


def test_zeros_stay_zeros():
    assert not orthogonalise(torch.zeros(2, 8, 4)).any()


@pytest.mark.parametrize("together", [1, 3])
def test_a_matrix_does_not_feel_its_neighbours(together):
    x_KMN = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(1))
    alone = torch.cat([orthogonalise(x_KMN[first : first + together]) for first in range(0, 3, together)])
    torch.testing.assert_close(alone, orthogonalise(x_KMN))
