"""A decoder takes the embedded latent of one segment and predicts pixels (Eq. 2, 8).

Shapes: B batch, N patches, K kept, M masked, S = 1 + N, R rows that go on (S, or M after the last block's
self-attention), T length of kv_g, E width, Q pixels of a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mirl.engine.models.checkpointing import CheckpointPlan
from mirl.engine.models.config import ModelConfig
from mirl.engine.models.execution import Regions
from mirl.engine.models.heads import prediction_head
from mirl.engine.models.layers import (
    Attention,
    Branch,
    CrossAttention,
    Mlp,
    ResidualNorm,
    StreamNorm,
    add_branch,
    layer_norm,
)
from mirl.engine.models.masking import PatchMask
from mirl.engine.models.skips import ExactSkips
from mirl.kernels import gather_tokens, gather_tokens_passing_on, scatter_tokens


class Entry(NamedTuple):
    """A block's self-attention starts from these inputs.

    x_BRE: the residual stream of the rows that go on. q_BRE: their queries. kv_BS2E: keys and values of all rows.
    Where all rows go on, the queries are [B, S, 3E] with keys and values in them, and kv_BS2E is None.
    bias_3E: the bias that q, k and v contain, if attention makes its gradient.
    """

    x_BRE: Tensor
    q_BRE: Tensor
    kv_BS2E: Tensor | None
    bias_3E: Tensor | None


class CrossInput(NamedTuple):
    """The cross-attention of a block reads ``kv``.

    kv: projected keys and values [B, T, 2E] under the kv prefix skip, kv_g [B, T, E] without it.
    bias_2E: the bias that the projected keys and values contain, if attention makes its gradient.
    """

    kv: Tensor
    bias_2E: Tensor | None = None


@dataclass(frozen=True)
class DecoderContext:
    """All decoders of one forward pass share this context.

    pos_SE: decoder positions. visible_pos_B1KE: positions of the class token and the kept patches of each image.
    masked_only: the last block goes on with the M masked rows alone.
    """

    mask: PatchMask
    pos_SE: Tensor
    visible_pos_B1KE: Tensor
    masked_only: bool

    @classmethod
    def make(cls, mask: PatchMask, pos_SE: Tensor, masked_only: bool) -> DecoderContext:
        return cls(mask, pos_SE, F.embedding(mask.visible_rows_B1K, pos_SE), masked_only)


class DecoderBlock(nn.Module):
    """The block computes x += SelfAttn(LN x); with DID x += MHA(LN x, LN kv_g); x += MLP(LN x).

    ``first``: the block is the first of its decoder, so that no MLP stands before it.
    """

    def __init__(self, width: int, heads: int, mlp_width: int, did: bool, first: bool = False) -> None:
        super().__init__()
        self.did = did
        self.norm1 = ResidualNorm(width, after_linear=not first)
        self.attn = Attention(width, heads)
        if did:
            self.norm_q = ResidualNorm(width)
            self.norm_kv = layer_norm(width)
            self.cross_attn = CrossAttention(width, heads)
        self.norm2 = ResidualNorm(width)
        self.mlp = Mlp(width, mlp_width)
        self.regions = Regions()

    def forward(self, entry: Entry, cross_kv_BT2E: Tensor | None, cross_bias_2E: Tensor | None = None) -> Branch:
        """Return x and delta [B, R, E], whose sum is the block's result, and the bias that delta lacks, if any.

        ``cross_kv_BT2E``: projected keys and values of kv_g, None without DID. ``cross_bias_2E``: the bias that they
        contain, if the cross-attention makes its gradient and the gradient of the queries' bias. Attention stays
        between the two regions, because kv_g has another length in every decoder.
        """
        x_BRE, attended_BRE = entry.x_BRE, self.attn.attend(entry.q_BRE, entry.kv_BS2E, bias=entry.bias_3E)
        finish = self.regions.get(DecoderBlock.finish)
        if self.did:
            ask = self.regions.get(DecoderBlock.ask)
            leave = self.norm_q.adds_bias(ask is not DecoderBlock.ask)
            q_bias_E = None if cross_bias_2E is None else self.cross_attn.q.bias
            x_BRE, q_BRE = ask(self, x_BRE, attended_BRE, leave, q_bias_E is None)
            attended_BRE = self.cross_attn.attend(q_BRE, cross_kv_BT2E, bias=q_bias_E, kv_bias_2D=cross_bias_2E)
        leave = self.norm2.adds_bias(finish is not DecoderBlock.finish)
        x_BRE, delta_BRE = finish(self, x_BRE, attended_BRE, leave)
        return x_BRE, delta_BRE, self.mlp.fc2.bias if leave else None

    def ask(self, x_BRE: Tensor, attended_BRE: Tensor, leave_bias: bool, bias_gradient: bool) -> tuple[Tensor, Tensor]:
        """End the self-attention and begin the cross-attention: return the residual stream and the queries.

        ``leave_bias``: leave the projection's bias to the norm after it. ``bias_gradient``: make the gradient of the
        queries' bias here.
        """
        branch_BRE = self.attn.proj(attended_BRE, not leave_bias)
        x_BRE, y_BRE = self.norm_q(x_BRE, branch_BRE, self.attn.proj.bias if leave_bias else None)
        return x_BRE, self.norm_q.feed(lambda y: self.cross_attn.q(y, bias_gradient), x_BRE, y_BRE)

    def finish(self, x_BRE: Tensor, attended_BRE: Tensor, leave_bias: bool) -> tuple[Tensor, Tensor]:
        """End the last attention and run the MLP: return the input of the MLP's branch and its output.

        ``leave_bias``: leave the biases of the projection and of the MLP to the norms after them.
        """
        proj = self.cross_attn.proj if self.did else self.attn.proj
        branch_BRE = proj(attended_BRE, not leave_bias)
        x_BRE, y_BRE = self.norm2(x_BRE, branch_BRE, proj.bias if leave_bias else None)
        return x_BRE, self.mlp.after(self.norm2, x_BRE, y_BRE, not leave_bias)

    def enter(self, branch: Branch, rows_BR: Tensor | None) -> Entry:
        """Make the entry from the full sequence, given as an open sum. ``rows_BR``: the rows that go on; None: all."""
        x_BSE, y_BSE = self.norm1(*branch)
        tokens = y_BSE.shape[1]
        bias_3E = self._bias_of(tokens if rows_BR is None else rows_BR.shape[1], tokens)
        if rows_BR is None:
            qkv_BS3E = self.norm1.feed(lambda y: self.attn.qkv(y, bias_gradient=bias_3E is None), x_BSE, y_BSE)
            return Entry(x_BSE, qkv_BS3E, None, bias_3E)
        y_BSE, y_BRE = gather_tokens_passing_on(y_BSE, rows_BR)
        parts = self.attn.qkv.of_several((y_BRE, "q"), (y_BSE, "kv"), bias_gradient=bias_3E is None)
        return Entry(gather_tokens(x_BSE, rows_BR), *parts, bias_3E)

    def _bias_of(self, queries: int, keys: int) -> Tensor | None:
        """Return the bias of queries, keys and values if the self-attention makes its gradient, else None."""
        return self.attn.qkv.bias if self.attn.takes_bias(queries, keys) else None

    def enter_from_table(
        self, e_B1KE: Tensor, mask_token_E: Tensor, context: DecoderContext, masked_only: bool
    ) -> Entry:
        """Make the entry from visible tokens alone, in a decoder's first block.

        In the first block a masked row is mask token + position in every image. So its q, k and v come from a table of
        N rows, and the matrix product runs over visible tokens only.
        """
        mask, pos_SE = context.mask, context.pos_SE
        # One row of the table stands for many rows of the sequence, so its gradient is the sum of their gradients.
        bias_3E = self._bias_of(mask.ids_masked.shape[1] if masked_only else len(pos_SE), len(pos_SE))
        table_1NE = (mask_token_E + pos_SE[1:])[None]
        _, visible_y = self.norm1(e_B1KE, context.visible_pos_B1KE)
        table_y = self.norm1(table_1NE)[1].squeeze(0)
        if masked_only:
            # No visible row goes on, so the residual stream and the queries come from the table alone.
            q_NE, kv_B1K2E, kv_N2E = self.attn.qkv.of_several(
                (table_y, "q"), (visible_y, "kv"), (table_y, "kv"), bias_gradient=bias_3E is None
            )
            kv_BS2E = scatter_tokens(kv_B1K2E, mask.ids_keep, mask.ids_restore, kv_N2E, None)
            return Entry(
                F.embedding(mask.ids_masked, table_1NE[0]), F.embedding(mask.ids_masked, q_NE), kv_BS2E, bias_3E
            )
        visible_qkv, table_qkv = self.attn.qkv.of_several(
            (visible_y, "qkv"), (table_y, "qkv"), bias_gradient=bias_3E is None
        )
        qkv_BS3E = scatter_tokens(visible_qkv, mask.ids_keep, mask.ids_restore, table_qkv, None)
        x_BSE = scatter_tokens(e_B1KE, mask.ids_keep, mask.ids_restore, mask_token_E, pos_SE)
        return Entry(x_BSE, qkv_BS3E, None, bias_3E)

    def project_kv(self, kv_BTE: Tensor) -> Tensor:
        """Project kv_g [B, T, E] to keys and values [B, T, 2E]. This is the plain form of `did.project_prefixes`."""
        return self.cross_attn.kv(self.norm_kv(kv_BTE))


class Decoder(nn.Module):
    """A decoder has its own mask token [1, 1, E] in the release's variant; in the paper's all decoders share one."""

    def __init__(self, config: ModelConfig, skips: ExactSkips) -> None:
        super().__init__()
        width = config.decoder_width
        self.skips = skips
        if config.variant == "release":
            self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.blocks = nn.ModuleList(
            DecoderBlock(
                width, config.decoder_heads, config.decoder_mlp_width, did=index < config.did_blocks, first=index == 0
            )
            for index in range(config.decoder_depth)
        )
        self.norm = StreamNorm(width)
        self.head = prediction_head(config.variant, width, config.patch_pixels)
        self.feature_head = nn.Linear(width, config.width) if config.feature_loss else None
        self.checkpointing = CheckpointPlan()

    def forward(
        self,
        e_B1KE: Tensor,
        shared_mask_token: Tensor | None,
        context: DecoderContext,
        cross_inputs: Sequence[CrossInput | None],
    ) -> tuple[Tensor, Tensor | None]:
        """Return pixels [B, M, Q] if ``context.masked_only``, else [B, N, Q]; and features [.., D] or None.

        cross_inputs: the input of each block's cross-attention, None for a block without DID.
        """
        mask_token = self.mask_token if shared_mask_token is None else shared_mask_token
        branch: Branch = (e_B1KE, None, None)
        for first, last in self.checkpointing.groups(0, len(self.blocks)):
            # A flat list, because a checkpoint function looks for tensors among its arguments alone.
            tensors = [x for given in cross_inputs[first:last] for x in given or (None, None)]
            run = partial(self._run_blocks, first, last, mask_token, context)
            # One tensor goes from group to group, because each group keeps what it begins with.
            branch = self.checkpointing.call(run, add_branch(*branch), *tensors)
        if context.masked_only:
            _, x = self.norm(*branch)
        else:
            x = self.norm(add_branch(*branch)[:, 1:])
        return self.head(x), None if self.feature_head is None else self.feature_head(x)

    def _run_blocks(
        self,
        first: int,
        last: int,
        mask_token: Tensor,
        context: DecoderContext,
        x: Tensor,
        *cross_tensors: Tensor | None,
    ) -> Branch:
        """Run blocks ``first`` to ``last`` - 1.

        x: e_g [B, 1 + K, E] before block 0, else the full sequence [B, S, E].
        ``cross_tensors``: the two fields of the `CrossInput` of each block, one block after another.
        """
        branch: Branch = (x, None, None)
        inputs = zip(range(first, last), cross_tensors[::2], cross_tensors[1::2], strict=True)
        for index, cross_input, cross_bias_2E in inputs:
            block = self.blocks[index]
            masked_only = context.masked_only and index == len(self.blocks) - 1
            entry = self._enter(block, index, branch, mask_token.flatten(), context, masked_only)
            if cross_input is not None and not self.skips.kv_prefix:
                cross_input = block.project_kv(cross_input)
            branch = block(entry, cross_input, cross_bias_2E)
        return branch

    def _enter(
        self,
        block: DecoderBlock,
        index: int,
        branch: Branch,
        mask_token_E: Tensor,
        context: DecoderContext,
        masked_only: bool,
    ) -> Entry:
        if index == 0:
            e_B1KE, mask = branch[0], context.mask
            if self.skips.mask_token_table:
                return block.enter_from_table(e_B1KE, mask_token_E, context, masked_only)
            x_BSE = scatter_tokens(e_B1KE, mask.ids_keep, mask.ids_restore, mask_token_E, context.pos_SE)
            branch = (x_BSE, None, None)
        return block.enter(branch, context.mask.masked_rows_BM if masked_only else None)
