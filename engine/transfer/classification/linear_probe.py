"""Train a linear classifier on frozen features.

Features are standardised (the BatchNorm without affine of MAE's protocol, with the exact statistics of the training
set). One Linear follows, trained by SGD with momentum on shuffled mini-batches. L-BFGS would need a search for a
penalty instead of a learning rate, and passes over all features at once, which ImageNet's size forbids on a small GPU.
Short SGD regularises by itself. As features are cached, all learning rates are trained side by side in one product.

Letters: n images, D width, C classes, R learning rates, b images of a mini-batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mirl.engine.transfer.classification.evaluation import hits
from mirl.errors import UserError

RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
BATCH = 1024
HELD_OUT = 10  # one in so many images of each class chooses the learning rate
_MOMENTUM = 0.9
_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class LabelledFeatures:
    """The features of a set are cached with their labels.

    features: float32 [n, D]; labels: int64 [n], both on one device; classes: their names, None for a list of paths.
    skipped: broken images, which are not among the n. account: how many files there are, as text (see `Ledger`).
    """

    features: Tensor
    labels: Tensor
    classes: list[str] | None
    skipped: int = 0
    account: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, rows: Tensor) -> LabelledFeatures:
        """Return the images numbered in ``rows``."""
        return LabelledFeatures(features=self.features[rows], labels=self.labels[rows], classes=self.classes)


@dataclass(frozen=True, kw_only=True)
class LinearProbe:
    """The probe has weight [C, D] and bias [C] for standardised features.

    rate: the learning rate that did best on held-out images.
    """

    mean: Tensor
    deviation: Tensor
    weight: Tensor
    bias: Tensor
    rate: float

    def __call__(self, features_nD: Tensor) -> Tensor:
        """Return logits [n, C]."""
        return F.linear((features_nD - self.mean) / self.deviation, self.weight, self.bias)


def train_linear_probe(
    train: LabelledFeatures, *, num_classes: int, epochs: int, seed: int, by_loss: bool = False
) -> LinearProbe:
    """Choose a learning rate on held-out training images, then train on all of them.

    by_loss: choose the rate with the lowest cross-entropy of the held-out images instead of the most right answers;
    for a probe that is the start of a training and not its end.

    Raises:
        UserError: no class has two images, so that nothing can be held out.
    """
    variance, mean = torch.var_mean(train.features, dim=0, correction=0)
    deviation = (variance + _EPS).sqrt()
    standard = LabelledFeatures(
        features=(train.features - mean) / deviation, labels=train.labels, classes=train.classes
    )
    kept, held = hold_out(train.labels, seed)
    if not len(held):
        raise UserError("no class has two training images, so no learning rate can be chosen: give more images")
    weight_RCD, bias_RC = _train(standard.subset(kept), num_classes, RATES, epochs, seed)
    trial = standard.subset(held)
    merits_R = []
    for weight_CD, bias_C in zip(weight_RCD, bias_RC, strict=True):
        logits = F.linear(trial.features, weight_CD, bias_C)
        loss, correct = F.cross_entropy(logits, trial.labels), hits(logits, trial.labels)[:, 0].sum()
        merits_R.append(-loss.item() if by_loss else correct.item())
    rate = RATES[max(range(len(RATES)), key=merits_R.__getitem__)]  # of equally good rates the smallest
    weight_RCD, bias_RC = _train(standard, num_classes, (rate,), epochs, seed)
    return LinearProbe(mean=mean, deviation=deviation, weight=weight_RCD[0], bias=bias_RC[0], rate=rate)


def hold_out(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return (kept, held out) image numbers by ``seed``: one in ten of each class, at least one if a class has two."""
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        members = (labels.cpu() == label).nonzero()[:, 0]
        count = max(1, len(members) // HELD_OUT) if len(members) > 1 else 0
        held[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return (~held).nonzero()[:, 0].to(labels.device), held.nonzero()[:, 0].to(labels.device)


def _train(
    data: LabelledFeatures, num_classes: int, rates: tuple[float, ...], epochs: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Return weights [R, C, D] and biases [R, C] after SGD from zeros, its rate falling along half a cosine to 0."""
    device, width = data.features.device, data.features.shape[1]
    weight_RCD = torch.zeros(len(rates), num_classes, width, device=device, requires_grad=True)
    bias_R1C = torch.zeros(len(rates), 1, num_classes, device=device, requires_grad=True)
    parameters = (weight_RCD, bias_R1C)
    velocity = [torch.zeros_like(parameter) for parameter in parameters]
    batch = min(BATCH, len(data))
    peak_R11 = torch.tensor(rates, device=device)[:, None, None] * batch / 256
    generator = torch.Generator().manual_seed(seed)
    steps_per_epoch = len(data) // batch
    total = epochs * steps_per_epoch
    for step in range(total):
        if step % steps_per_epoch == 0:
            order = torch.randperm(len(data), generator=generator).to(device)
        rows = order[step % steps_per_epoch * batch :][:batch]
        logits_RbC = data.features[rows] @ weight_RCD.mT + bias_R1C
        labels_Rb = data.labels[rows].expand(len(rates), -1)
        # The loss is a sum over the rates, so that each has a gradient of its own.
        loss = F.cross_entropy(logits_RbC.flatten(0, 1), labels_Rb.flatten(), reduction="sum") / batch
        gradients = torch.autograd.grad(loss, parameters)
        rate_R11 = peak_R11 * 0.5 * (1 + math.cos(math.pi * step / total))
        with torch.no_grad():
            for parameter, gradient, moving in zip(parameters, gradients, velocity, strict=True):
                moving.mul_(_MOMENTUM).add_(gradient)
                parameter.sub_(rate_R11 * moving)
    return weight_RCD.detach(), bias_R1C.detach()[:, 0]
