"""Masks: sorted ids, each patch once, the smallest noise kept."""

from __future__ import annotations

import pytest
import torch

from mirl.engine.models import PatchMask, mask_from_noise


def test_worked_example() -> None:
    mask = mask_from_noise(torch.tensor([[0.9, 0.1, 0.5, 0.3], [0.1, 0.2, 0.3, 0.4]]), 0.5)
    assert mask.ids_keep.tolist() == [[1, 3], [0, 1]]
    assert mask.ids_masked.tolist() == [[0, 2], [2, 3]]
    assert mask.ids_restore.tolist() == [[2, 0, 3, 1], [0, 1, 2, 3]]
    assert mask.mask_BN.tolist() == [[True, False, True, False], [False, False, True, True]]
    assert mask.visible_rows_B1K.tolist() == [[0, 2, 4], [0, 1, 2]]
    assert mask.masked_rows_BM.tolist() == [[1, 3], [3, 4]]


@pytest.mark.parametrize("mask_ratio", [0.1, 0.5, 0.75, 0.9])
def test_every_patch_once_in_order(mask_ratio: float) -> None:
    noise = torch.rand(7, 35, generator=torch.Generator().manual_seed(0))
    mask = mask_from_noise(noise, mask_ratio)
    kept = int(35 * (1 - mask_ratio))
    assert mask.ids_keep.shape == (7, kept) and mask.ids_masked.shape == (7, 35 - kept)
    both = torch.cat([mask.ids_keep, mask.ids_masked], dim=1)
    assert torch.equal(both.sort(dim=1).values, torch.arange(35).expand(7, -1))
    assert torch.equal(both.gather(1, mask.ids_restore), torch.arange(35).expand(7, -1))
    assert (mask.ids_keep.diff(dim=1) > 0).all() and (mask.ids_masked.diff(dim=1) > 0).all()
    largest_kept = noise.gather(1, mask.ids_keep).amax(dim=1)
    smallest_masked = noise.gather(1, mask.ids_masked).amin(dim=1)
    assert (largest_kept < smallest_masked).all()


def test_equal_noise_keeps_the_first_patches() -> None:
    assert mask_from_noise(torch.zeros(1, 8), 0.5).ids_keep.tolist() == [[0, 1, 2, 3]]


def test_from_bool_is_the_inverse_of_mask() -> None:
    mask = mask_from_noise(torch.rand(4, 12, generator=torch.Generator().manual_seed(1)), 0.75)
    again = PatchMask.from_bool(mask.mask_BN, num_kept=3)
    for name in ("ids_keep", "ids_masked", "ids_restore"):
        assert torch.equal(getattr(again, name), getattr(mask, name))


def test_noise_that_is_no_matrix() -> None:
    with pytest.raises(ValueError, match=r"noise has shape \[8\]: give \[batch, patches\]"):
        mask_from_noise(torch.rand(8), 0.75)


@pytest.mark.parametrize("mask_ratio", [0.0, 0.95, 1.0])
def test_nothing_kept_or_nothing_masked(mask_ratio: float) -> None:
    with pytest.raises(ValueError, match="keep at least one and mask at least one"):
        mask_from_noise(torch.rand(2, 8), mask_ratio)
