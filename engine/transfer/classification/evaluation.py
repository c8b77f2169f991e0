"""Top-1, top-5 and loss on a labelled set: sums over all images of all ranks, each counted once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from mirl.dataloaders import EvalLoader
from mirl.dataloaders.sources.class_names import CLASS_NAMES
from mirl.errors import UserError

TOP = 5


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Counts of images; ``loss`` is their mean cross-entropy."""

    images: int
    correct: int
    correct_in_5: int
    loss: float

    @property
    def top1_percent(self) -> float:
        return 100 * self.correct / max(1, self.images)

    @property
    def top5_percent(self) -> float:
        """Label among the 5 largest logits, or among all where there are fewer classes."""
        return 100 * self.correct_in_5 / max(1, self.images)

    def metrics(self, prefix: str = "val_") -> dict[str, float]:
        """For a log."""
        values = {"loss": self.loss, "top1_percent": self.top1_percent, "top5_percent": self.top5_percent}
        return {prefix + name: value for name, value in values.items()} | {prefix + "images": self.images}


class EvaluationInterrupted(Exception):
    """The run is to end; there are no scores."""


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: EvalLoader, device: torch.device, interrupted: Callable[[], bool] | None = None
) -> Scores:
    """Scores of ``model`` (images -> logits) in eval mode, the same on every rank of the process group, if any.

    ``loader`` is of this rank; padding and broken images, which it marks, are in no count. Counts are exact on every
    number of ranks and batch size; the loss differs by the order of a float64 sum.

    Raises:
        EvaluationInterrupted: ``interrupted``, asked before every batch, said so.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    training = model.training
    model.eval()
    try:
        for batch in loader:
            if interrupted is not None and interrupted():
                raise EvaluationInterrupted
            logits = model(batch.images)
            valid_B = torch.from_numpy(batch.valid).to(device)
            loss_B = F.cross_entropy(logits.float(), batch.labels, reduction="none")
            hits_BT = hits(logits, batch.labels)
            columns = (torch.ones_like(loss_B), hits_BT[:, 0], hits_BT.any(dim=1), loss_B)
            # where, not a product: what padding gives may be no number
            sums += torch.stack([torch.where(valid_B, column, 0).sum(dtype=torch.float64) for column in columns])
    finally:
        model.train(training)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    images, correct, correct_in_5, loss = sums.tolist()
    return Scores(
        images=int(images), correct=int(correct), correct_in_5=int(correct_in_5), loss=loss / max(1.0, images)
    )


def hits(logits_BC: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
    """bool [B, T]: whether the t-th largest logit is the label's, T = min(5, C)."""
    best_BT = logits_BC.topk(min(TOP, logits_BC.shape[1]), dim=1).indices
    return best_BT == labels_B[:, None]


def require_same_classes(ours: Sequence[str] | None, theirs: Sequence[str] | None, *, train: str, val: str) -> None:
    """UserError where two sets number their classes differently: their labels would mean different things.

    Class names come from folders, or from beside shards; a list of paths has numbers alone (None), which must agree by
    themselves. Names on one side alone are refused: folders called 0 ... 11 are numbered as text, 0, 1, 10, 11, 2 ...
    ``train``, ``val``: the sets, for the message.
    """
    if ours is not None and theirs is None or ours is None and theirs is not None:
        named, bare = (train, val) if theirs is None else (val, train)
        raise UserError(
            f"the classes of {named} have names and those of {bare} are numbers alone, which cannot be compared: give "
            "both as class folders, or both as lists with class numbers (of shards, write the names into "
            f"{CLASS_NAMES} beside them, line n for class n)"
        )
    if ours is None or theirs is None or list(ours) == list(theirs):
        return
    extra, missing = sorted(set(theirs) - set(ours)), sorted(set(ours) - set(theirs))
    parts = [f"{val} has {_some(extra)}, which {train} lacks"] if extra else []
    parts += [f"{val} lacks {_some(missing)}"] if missing else []
    raise UserError(f"the classes of {train} and {val} differ: {'; '.join(parts)}; give sets of the same classes")


def _some(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:3]))
    return f"class {shown}" if len(names) == 1 else f"{len(names)} classes ({shown}{', ...' if len(names) > 3 else ''})"
