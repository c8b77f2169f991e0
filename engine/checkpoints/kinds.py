"""Tell the kind of a checkpoint that a user has given, and refuse it if another is needed. This needs no torch."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirl.engine.checkpoints.best import Best, read_best
from mirl.engine.checkpoints.finding import locate, read_state, verify
from mirl.engine.configuration.config import section_from_dict
from mirl.engine.models.config import ModelConfig
from mirl.errors import UserError

PRETRAINED, ENCODER = "pre-trained model", "encoder"
CLASSIFIER, SEGMENTER, DETECTOR = "classifier", "segmenter", "detector"
# A section of a run's settings tells its kind.
_SECTIONS = {"finetune": CLASSIFIER, "segment": SEGMENTER, "detect": DETECTOR}
# Each kind has a name in a sentence, and a command that makes one.
_NAMES = {
    PRETRAINED: "a pre-trained model with its decoders",
    ENCODER: "a pre-trained encoder without decoders",
    CLASSIFIER: "a fine-tuned classifier",
    SEGMENTER: "a segmenter",
    DETECTOR: "a detector",
}
_SOURCES = {
    PRETRAINED: "give the run of mirl pretrain, or an imported model that has its decoders",
    ENCODER: "give the run of mirl pretrain, or an imported model",
    CLASSIFIER: "fine-tune it first (mirl finetune --checkpoint {given} --data TRAIN --val VAL) and give that run",
    SEGMENTER: "train one first (mirl segment --checkpoint {given} --data IMAGES --labels LABELS) and give that run",
    DETECTOR: "train one first (mirl detect --checkpoint {given} --data DIR --annotations FILE) and give that run",
}
WHICH = ("best", "last")


@dataclass(frozen=True, kw_only=True)
class Given:
    """A user named this checkpoint. ``best``: its record, if it was taken as the best of its run."""

    asked: Path
    checkpoint: Path
    state: dict[str, Any]
    best: Best | None = None

    @property
    def kind(self) -> str:
        """Return PRETRAINED, ENCODER, CLASSIFIER, SEGMENTER or DETECTOR."""
        return kind_of(self.state)

    @property
    def weights(self) -> str:
        """Return "ema" if a classifier's average of the weights made it the best of its run, else "last"."""
        return self.best.weights if self.best else "last"

    def require(self, command: str, *kinds: str) -> Given:
        """Return itself if it is one of ``kinds``.

        Otherwise raise UserError that says what ``command`` needs and what this is.
        """
        require_kind(self.state, self.asked, command, *kinds)
        return self

    def __str__(self) -> str:
        why = f"the best by validation: {self.best}; --which last takes the newest" if self.best else ""
        chosen = why or ("the newest of its run" if self.checkpoint != self.asked else "")
        return f"{self.checkpoint}: {describe(self.state)}" + (f"; {chosen}" if chosen else "")


def given(path: Path | str, which: str | None = None) -> Given:
    """Return the checkpoint that a user means by ``path``, a checkpoint or a run.

    which: of a run, "best" by validation or "last", the newest good one; None: the best if the run has recorded one,
    else the last.

    Raises:
        UserError: there is no checkpoint, it is damaged, or ``which`` is given for a path that is one checkpoint.
    """
    path = Path(path)
    if (path / "manifest.json").is_file() or (path / "state.json").is_file():
        if which is not None:
            raise UserError(f"which is {which!r} and {path} is one checkpoint: leave it out, or give the run's folder")
        checkpoint = locate(path)
        return Given(asked=path, checkpoint=checkpoint, state=read_state(checkpoint))
    best = _best_of(path) if which != "last" else None
    if best is None and which == "best":
        raise UserError(
            f"which is 'best' and {path} has no best checkpoint: give last (a fine-tuning run with --val keeps one)"
        )
    if best is None:
        checkpoint = locate(path)
        return Given(asked=path, checkpoint=checkpoint, state=read_state(checkpoint))
    folder, record = best
    checkpoint = folder / record.checkpoint
    if problem := "it is missing" if not checkpoint.is_dir() else verify(checkpoint):
        raise UserError(f"the best checkpoint of {path}, {checkpoint}, is damaged: {problem}; give --which last")
    return Given(asked=path, checkpoint=checkpoint, state=read_state(checkpoint), best=record)


def _best_of(path: Path) -> tuple[Path, Best] | None:
    """Return the folder of checkpoints and the record in it."""
    for folder in (path, path / "checkpoints"):
        if record := read_best(folder):
            return folder, record
    return None


def kind_of(state: dict[str, Any]) -> str:
    """Tell the kind of a checkpoint by its state: PRETRAINED, ENCODER, CLASSIFIER, SEGMENTER or DETECTOR."""
    for section, kind in _SECTIONS.items():
        if section in (state.get("config") or {}):
            return kind
    parameters = state.get("parameters") or {}
    return ENCODER if parameters and all(name.startswith("encoder.") for name in parameters) else PRETRAINED


def describe(state: dict[str, Any]) -> str:
    """Say in a few words what a checkpoint is, and what it was made from."""
    config, kind = state.get("config") or {}, kind_of(state)
    if kind in (PRETRAINED, ENCODER):
        model = _label(config.get("model") or {})
        return _NAMES[kind] + (f" ({model})" if model else "")
    source = _source(config)
    parameters = state.get("parameters") or {}
    head = parameters.get("head.weight") or parameters.get("decode_head.conv_seg.weight")
    classes = head[0] if head else len(config.get("classes", ()))
    return f"{_NAMES[kind]} of {classes} classes" + (f", made from {source}" if source else "")


def _source(config: dict[str, Any]) -> str | None:
    """Return the checkpoint from which a run of transfer started."""
    sections = (config.get(section) or {} for section in _SECTIONS)
    return next((section["checkpoint"] for section in sections if section.get("checkpoint")), None)


def _label(model: dict[str, Any]) -> str | None:
    """Return the name of the size, or that it was changed; the given name if this version cannot read the model."""
    try:
        return section_from_dict(ModelConfig, model, source="").label if model else None
    except (UserError, TypeError):
        return model.get("name")


def require_kind(state: dict[str, Any], asked: Path | str, command: str, *kinds: str) -> None:
    """Raise a one-line UserError unless a checkpoint is one of ``kinds``: what it is, what is needed, what to give."""
    kind = kind_of(state)
    if kind in kinds:
        return
    source = _source(state.get("config") or {})
    mend = (
        f"give {source}"
        if source and not set(kinds) & set(_SECTIONS.values())
        else _SOURCES[kinds[0]].format(given=shlex.quote(os.fspath(asked)))
    )
    raise UserError(f"{asked} is {describe(state)}: {command} needs {_NAMES[kinds[0]]}; {mend}")
