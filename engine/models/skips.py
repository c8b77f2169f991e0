"""The exact skips leave out work of the plain form of the model that cannot change its loss or gradients.

Each is on by default and can be switched off on its own, to measure what it brings and to test that it changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ExactSkips:
    """`ExactSkips` says which skips a model takes.

    visible_only_projection: gather the pixels of kept patches and project those, instead of projecting all patches.
    masked_only_tail: in a decoder's last block only masked tokens ask questions (queries, cross-attention, MLP, head).
    kv_prefix: normalise e_0 ... e_{G-1} once for all decoders, into one buffer of which every kv_g is a prefix.
    shared_loss_gradient: give both decoders of a pair one gradient tensor, written in the forward pass of the loss.
    mask_token_table: take the first self-attention's q, k, v of masked tokens, alike in all images, from a table of N
    rows.
    """

    visible_only_projection: bool = True
    masked_only_tail: bool = True
    kv_prefix: bool = True
    shared_loss_gradient: bool = True
    mask_token_table: bool = True
