"""An encoder gives feature maps of images of any size, and BEiT's pyramid scales four of them.

Shapes: B batch, H W image, C channels, P patch side, h = H / P, w = W / P, N = h * w patches, S = 1 + N, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mirl.engine.models.compute_choices import ComputeChoices
from mirl.engine.models.config import ModelConfig
from mirl.engine.models.encoder import Encoder
from mirl.engine.models.initialise import initialise
from mirl.engine.models.layers import Branch, add_branch
from mirl.engine.models.pixels import image_layout
from mirl.engine.models.positions import sincos_positions
from mirl.engine.transfer.encoder_model import all_visible, encoder_config
from mirl.errors import UserError
from mirl.kernels import assemble_tokens

MOST_TABLES = 16  # a table of 64 x 64 positions of width 768 takes 12 MB


def taken_blocks(depth: int) -> tuple[int, ...]:
    """Number, from 0, the blocks whose outputs are the four maps: the last ones of depth x 1/3, 1/2, 2/3 and 1.

    BEiT and CAE take 3, 5, 7, 11 of 12 blocks and 7, 11, 15, 23 of 24. If these are not four different blocks, the last
    four are taken. UserError for an encoder of fewer than four.

    >>> taken_blocks(12), taken_blocks(48)
    ((3, 5, 7, 11), (15, 23, 31, 47))
    """
    ends = (depth // 3, depth // 2, 2 * depth // 3, depth)
    if depth < 4:
        raise UserError(f"depth is {depth}: four feature maps need an encoder of 4 blocks or more")
    if len(set(ends)) < 4:
        ends = tuple(range(depth - 3, depth + 1))
    return tuple(end - 1 for end in ends)


class DenseModel(ComputeChoices):
    """This is the base of a model that predicts at every place of an image: the encoder, at any image size.

    State dict: ``encoder.*`` under timm's names, without ``norm``: the maps are the blocks' own outputs, as in BEiT,
    CAE and MAE. Positions are fixed, so it leaves them out. ``config`` has the image size of training; a forward pass
    takes any size whose sides are multiples of the patch side.

    A subclass initialises what it adds; the encoder is initialised here, from torch's global random numbers.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        drop_path: float = 0.0,
        position_grid: tuple[int, int] | None = None,
        taken: Sequence[int] | None = None,
    ) -> None:
        """Build the encoder of ``config``, whose fields on decoders and objective are not used.

        position_grid: the grid of pre-training, over which the positions of any other grid are stretched; None: that of
        ``config``. taken: ascending numbers of the blocks whose outputs are maps, the last block among them; None:
        `taken_blocks`.
        """
        super().__init__(encoder_config(config, drop_path, config.attention))
        self.taken = taken_blocks(config.depth) if taken is None else tuple(taken)
        assert list(self.taken) == sorted(set(self.taken)) and self.taken[-1] == config.depth - 1, self.taken
        self.position_grid = position_grid or self.config.grid
        self._tables: dict[tuple[Any, ...], Tensor] = {}  # positions of the grids last seen
        self.encoder = _DenseEncoder(self.config)
        self.encoder.norm = nn.Identity()
        del self.encoder.pos_embed  # it is of one grid alone
        initialise(self.encoder)

    def feature_maps(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the output of each taken block as a map [B, D, h, w], in the dtype of the weights, without a norm.

        images: uint8 [B, H, W, C], or normalised float [B, C, H, W]. UserError if the patch side does not divide H and
        W, or C is not the model's.
        """
        self.choose(images)
        return self.encoder(self._maps, images)

    def _maps(self, images: Tensor) -> tuple[Tensor, ...]:
        grid = self._grid_of(images)
        branch: Branch = (self.embed(images, grid), None, None)
        maps, start = [], 0
        for stop in (block + 1 for block in self.taken):
            branch = self._advance(start, stop, branch)
            maps.append(add_branch(*branch)[:, 1:].transpose(1, 2).unflatten(2, grid))
            start = stop
        return tuple(maps)

    def embed(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return class token and all patches with the positions of ``grid`` (rows, columns): [B, S, D]."""
        encoder = self.encoder
        ids_BN = all_visible(len(images), grid[0] * grid[1], images.device).ids_keep
        x_BND = encoder.patch_embed(images, ids_BN).to(encoder.cls_token.dtype)
        return assemble_tokens(x_BND, ids_BN, self.positions(grid, x_BND), encoder.cls_token.flatten())

    def positions(self, grid: tuple[int, int], like: Tensor) -> Tensor:
        """Return the fixed positions of ``grid``, [N, D], in the dtype and on the device of ``like``."""
        key = (*grid, like.device, like.dtype)
        if key not in self._tables:
            while len(self._tables) >= MOST_TABLES:
                self._tables.pop(next(iter(self._tables)))
            table_ND = sincos_positions(grid, self.config.width, self.position_grid)[1:]
            self._tables[key] = table_ND.to(device=like.device, dtype=like.dtype)
        return self._tables[key]

    def trial_loss(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return the distance of the maps to random ones, plus the squares of all parameters outside the encoder.

        The parts outside the encoder are never compiled. No pass of theirs is made, because it could wait for other
        ranks, so their parameters enter the loss directly.
        """
        loss = images.new_zeros((), dtype=torch.float32)
        for map_BDhw in self.feature_maps(images):
            random_BDhw = torch.randn(map_BDhw.shape, generator=generator).to(map_BDhw)
            loss = loss + (map_BDhw - random_BDhw).float().square().mean()
        rest = [parameter for name, parameter in self.named_parameters() if not name.startswith("encoder.")]
        return loss + sum(parameter.float().square().mean() for parameter in rest)

    def choose(self, images: Tensor, *, plain: bool = False) -> None:
        """Choose as any model does; regions are compiled for the image size of training alone."""
        super().choose(images, plain=plain or self._grid_of(images) != self.config.grid)

    def _advance(self, start: int, stop: int, branch: Branch) -> Branch:
        """Run blocks ``start`` to ``stop`` - 1 on an open sum, and return one."""
        plan = self.encoder.checkpointing
        if plan.group == 0:
            return self.encoder.run_blocks(start, stop, *branch)
        x_BSD = add_branch(*branch)  # each group keeps the one tensor with which it begins
        for first, last in plan.groups(start, stop):
            x_BSD = plan.call(_Blocks(self.encoder, first, last), x_BSD)
        return x_BSD, None, None

    def _grid_of(self, images: Tensor) -> tuple[int, int]:
        height, width = images.shape[1:3] if image_layout(images) == "BHWC" else images.shape[2:4]
        return height // self.config.patch_size, width // self.config.patch_size

    def _check_images(self, images: Tensor) -> None:
        side, channels = self.config.patch_size, self.config.channels
        last = image_layout(images) == "BHWC"
        height, width, found = images.shape[1:] if last else (*images.shape[2:], images.shape[1])
        if height % side or width % side or not height or not width or found != channels:
            raise UserError(
                f"images have shape {list(images.shape)} and dtype {images.dtype}: this model takes uint8 [B, H, W, "
                f"{channels}] or float [B, {channels}, H, W], with H and W multiples of {side}"
            )


class _DenseEncoder(Encoder):
    """The forward pass of this encoder runs a function of the dense model, while ZeRO-3 has gathered its parameters."""

    def forward(self, run: Callable[..., Any], *inputs: Any) -> Any:
        """Return ``run(*inputs)``."""
        return run(*inputs)


class _Blocks:
    """These blocks are recomputed together."""

    def __init__(self, encoder: Encoder, first: int, last: int) -> None:
        self.encoder, self.first, self.last = encoder, first, last

    def __call__(self, x_BSD: Tensor) -> Tensor:
        return add_branch(*self.encoder.run_blocks(self.first, self.last, x_BSD))


class Pyramid(nn.Module):
    """Scale four maps of one size to strides 4, 8, 16 and 32 for a patch of 16; all keep the encoder's width.

    | name   | size | how                                       |
    |--------|------|-------------------------------------------|
    | `fpn1` | x 4  | deconvolution, norm, GELU, deconvolution  |
    | `fpn2` | x 2  | deconvolution                             |
    | `fpn3` | x 1  | nothing                                   |
    | `fpn4` | / 2  | largest of 2 x 2                          |

    Names and operations as in the backbone of BEiT's segmentation and CAE's detection.
    """

    def __init__(self, width: int, norm: Callable[[int], nn.Module]) -> None:
        """Build the layers. norm: makes a norm of so many channels, which takes [B, D, h, w]."""
        super().__init__()

        def double() -> nn.ConvTranspose2d:
            return nn.ConvTranspose2d(width, width, kernel_size=2, stride=2)

        self.fpn1 = nn.Sequential(double(), norm(width), nn.GELU(), double())
        self.fpn2 = nn.Sequential(double())
        self.fpn3 = nn.Identity()
        self.fpn4 = nn.MaxPool2d(kernel_size=2, stride=2)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scale four maps [B, D, h, w]: [B, D, 4h, 4w], [B, D, 2h, 2w], [B, D, h, w] and [B, D, h // 2, w // 2]."""
        first, second, third, fourth = maps
        return self.fpn1(first), self.fpn2(second), self.fpn3(third), self.fpn4(fourth)
