"""Fixed positions for another grid."""

from __future__ import annotations

import pytest
import torch

from mirl.engine.models.positions import resample_positions, sincos_positions

# Smaller, larger, another shape, one row.
GRIDS = [((4, 4), (2, 3)), ((4, 6), (7, 9)), ((3, 5), (5, 3)), ((4, 4), (1, 8))]


@pytest.mark.parametrize(("source", "target"), GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_to_timm(source, target, dtype):
    timm = pytest.importorskip("timm.layers", reason="needs: pip install timm")
    table = sincos_positions(source, 16)[None].to(dtype) + 0.1
    expected = timm.resample_abs_pos_embed(table, list(target), old_size=list(source), num_prefix_tokens=1)
    actual = resample_positions(table, source, target)
    assert actual.dtype == dtype
    assert torch.equal(actual, expected)
    assert torch.equal(actual[:, 0], table[:, 0])
    assert torch.equal(resample_positions(table[0], source, target), expected[0])


def test_the_same_grid_keeps_the_table():
    table = sincos_positions((3, 4), 8)[None]
    assert torch.equal(resample_positions(table, (3, 4), (3, 4)), table)


def test_rows_and_columns_are_not_exchanged():
    """A table that grows from row to row alone still does, on a grid of another shape."""
    table = torch.cat([torch.zeros(1, 4), torch.arange(3.0).repeat_interleave(5)[:, None].expand(15, 4)])
    resampled = resample_positions(table, (3, 5), (6, 2))[1:, 0].reshape(6, 2)
    assert torch.equal(resampled[:, 0], resampled[:, 1])
    assert (resampled[1:] > resampled[:-1]).all()


@pytest.mark.parametrize("shape", [(1, 16, 8), (2, 17, 8), (18, 8), (17,)])
def test_a_table_of_another_grid_is_refused(shape):
    with pytest.raises(ValueError, match=r"their grid is 4x4: give \[17, width\]"):
        resample_positions(torch.zeros(shape), (4, 4), (2, 2))
