"""Classify frozen features by weighted k nearest neighbours, with DINO's protocol: nothing is trained.

Letters: n training images, q queries, k neighbours, D width, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mirl.engine.transfer.classification.linear_probe import LabelledFeatures
from mirl.errors import UserError

_QUERIES = 256  # so many at a time, because their similarities to all n are in memory at once


def knn_votes(train: LabelledFeatures, queries_qD: Tensor, *, num_classes: int, k: int, temperature: float) -> Tensor:
    """Return votes [q, C]: for each class the sum of exp(cosine similarity / temperature).

    The sum is over those of the k nearest training images that belong to the class.

    Two neighbours of class 0 at similarity 0.9 outvote one of class 1 at 0.95 with temperature 0.07:
    2 * exp(12.86) > exp(13.57).

    Raises:
        UserError: k is not in 1 ... n.
    """
    if not 1 <= k <= len(train):
        raise UserError(f"knn_k is {k} and there are {len(train)} training images: give 1 to {len(train)}")
    keys_nD = F.normalize(train.features, dim=1)
    votes = []
    for chunk_bD in F.normalize(queries_qD, dim=1).split(_QUERIES):
        similarity_bk, nearest_bk = (chunk_bD @ keys_nD.T).topk(k, dim=1)
        # The largest is subtracted, so that exp cannot overflow. This scales all votes of a query alike.
        weights_bk = ((similarity_bk - similarity_bk[:, :1]) / temperature).exp()
        votes_bC = weights_bk.new_zeros(len(chunk_bD), num_classes)
        votes.append(votes_bC.scatter_add_(1, train.labels[nearest_bk], weights_bk))
    return torch.cat(votes)
