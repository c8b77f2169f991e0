"""Random masking turns noise into sorted patch ids. Nothing here draws random numbers.

Shapes: B batch, N patches, K kept, M masked. Ids are int64.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class PatchMask:
    """A mask says which patches of each image are kept.

    ids_keep [B, K], ids_masked [B, M]: patch numbers, ascending in each row; together each patch once.
    ids_restore [B, N]: the row of patch n in concat(kept, masked), so below K where n is kept.
    """

    ids_keep: Tensor
    ids_masked: Tensor
    ids_restore: Tensor

    @cached_property
    def mask_BN(self) -> Tensor:
        """Return bool [B, N], True = masked."""
        return self.ids_restore >= self.ids_keep.shape[1]

    @cached_property
    def visible_rows_B1K(self) -> Tensor:
        """Return [B, 1 + K], the rows of the class token and the kept patches in a full sequence [B, 1 + N, ...]."""
        return torch.cat([self.ids_keep.new_zeros(len(self.ids_keep), 1), self.ids_keep + 1], dim=1)

    @cached_property
    def masked_rows_BM(self) -> Tensor:
        """Return [B, M], the rows of the masked patches in a full sequence [B, 1 + N, ...]."""
        return self.ids_masked + 1

    @property
    def num_patches(self) -> int:
        return self.ids_restore.shape[1]

    def to(self, device: torch.device | str) -> PatchMask:
        return PatchMask(self.ids_keep.to(device), self.ids_masked.to(device), self.ids_restore.to(device))

    @classmethod
    def from_bool(cls, mask_BN: Tensor, num_kept: int) -> PatchMask:
        """Make a mask from bool [B, N], True = masked, with exactly ``num_kept`` kept patches in each row.

        The count is not checked: a check would wait for the device.
        """
        # A stable sort of False before True lists the kept patches, then the masked ones, each in ascending order.
        order_BN = torch.argsort(mask_BN.to(torch.uint8), dim=1, stable=True)
        rows_BN = torch.arange(order_BN.shape[1], device=order_BN.device).expand_as(order_BN)
        ids_restore_BN = torch.empty_like(order_BN).scatter_(1, order_BN, rows_BN)
        return cls(order_BN[:, :num_kept].contiguous(), order_BN[:, num_kept:].contiguous(), ids_restore_BN)


def mask_from_noise(noise_BN: Tensor, mask_ratio: float) -> PatchMask:
    """Keep the K = int(N * (1 - mask_ratio)) patches of smallest noise in each row, as MAE does.

    noise_BN: floating point [B, N]; among equal values the lower patch number counts as smaller.
    ValueError if the shape is not [B, N] or nothing would be kept or masked.

    >>> mask_from_noise(torch.tensor([[0.9, 0.1, 0.5, 0.3]]), 0.5).ids_keep
    tensor([[1, 3]])
    """
    if noise_BN.ndim != 2:
        raise ValueError(f"noise has shape {list(noise_BN.shape)}: give [batch, patches]")
    num_patches = noise_BN.shape[1]
    num_kept = int(num_patches * (1 - mask_ratio))
    if not 0 < num_kept < num_patches:
        raise ValueError(
            f"mask_ratio is {mask_ratio}: it keeps {num_kept} of {num_patches} patches; "
            "keep at least one and mask at least one"
        )
    ids_keep_BK = torch.argsort(noise_BN, dim=1, stable=True)[:, :num_kept]
    masked_BN = torch.ones_like(noise_BN, dtype=torch.bool).scatter_(1, ids_keep_BK, False)
    return PatchMask.from_bool(masked_BN, num_kept)
