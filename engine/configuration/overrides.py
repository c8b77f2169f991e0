"""A recipe with single fields changed, whether flags or keyword arguments ask for it."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

from mirl.engine.configuration.config import Config, OptimConfig, is_offered
from mirl.engine.configuration.image_sizes import resized
from mirl.engine.models.config import MODEL_NAMES, SINGLE_DECODER, SIZE_FIELDS, ModelConfig, model_config
from mirl.errors import UserError
from mirl.settings import require_finite

C = TypeVar("C", bound=Config)


def override(base: C, given: Mapping[str, Any]) -> C:
    """``base`` with the fields of ``given``, whose keys are SECTION.FIELD.

    The key model.name replaces all fields of the model. SECTION.image_size is the pair (height, width). A length given
    in epochs replaces one in steps, and the other way round; a warm-up that no longer fits becomes a tenth of the run.
    The image sizes of a recipe follow another image size or patch size, each rounded to whole patches.

    Raises:
        UserError: the fields do not fit together, or a number is none.
    """
    for key, value in given.items():  # before anything is reckoned from one
        require_finite(key.split(".")[-1], value)
    made = {name: _override(getattr(base, name), kind, given, name) for name, kind in base.sections().items()}
    if base.data.image_sizes and "data.image_sizes" not in given:
        sizes = resized(base.data.image_sizes, base.model, made["model"])  # type: ignore[attr-defined]
        made["data"] = dataclasses.replace(made["data"], image_sizes=sizes)
    return dataclasses.replace(base, **made)


def override_by_keyword(base: C, changes: Mapping[str, Any]) -> C:
    """As `override`; the keys are the names of the flags with underscores: ``steps``, ``image_size``, ``model``.

    A single string or number stands for a field that takes several, and one side for a square image.

    Raises:
        UserError: a name that no flag has, with the nearest one, or fields that do not fit together.
    """
    return override(base, by_section(base, changes))


def by_section(base: Config, changes: Mapping[str, Any]) -> dict[str, Any]:
    """``changes`` with keys as `override` takes them; UserError for a name that no flag has."""
    homes = {
        item.name: section
        for section, kind in base.sections().items()
        for item in dataclasses.fields(kind)
        if is_offered(item, section, base.sections())
    }
    several = {
        item.name
        for section, kind in base.sections().items()
        for item in dataclasses.fields(kind)
        if is_offered(item, section, base.sections())
        and str(item.type).startswith("tuple[")
        and "..." in str(item.type)
    }
    given = {}
    for key, value in changes.items():
        if key == "image_size":
            size = value if isinstance(value, tuple | list) else (value, value)
            given[f"{homes['image_height']}.image_size"] = tuple(size)
        elif key == "model" and "name" in homes:
            given["model.name"] = value
        elif key in homes and key != "name":
            alone = key in several and not isinstance(value, tuple | list)
            given[f"{homes[key]}.{key}"] = (str(value),) if alone else value
        else:
            near = difflib.get_close_matches(key, [*homes, "image_size", "model"], n=1)
            raise UserError(f"{key} is no setting: {f'did you mean {near[0]}?' if near else 'see --help for all'}")
    return given


def _override(section: Any, kind: type, given: Mapping[str, Any], name: str) -> Any:
    changes = {key.split(".", 1)[1]: value for key, value in given.items() if key.startswith(name + ".")}
    for key, value in changes.items():
        if isinstance(value, list):
            changes[key] = tuple(value)
    if "image_size" in changes:
        changes["image_height"], changes["image_width"] = changes.pop("image_size")
    if kind is ModelConfig and {"mean", "std"} & set(changes):
        changes = {"statistics": "given"} | changes
    if kind is ModelConfig and "name" in changes:
        return model_config(changes.pop("name"), **changes)
    if kind is ModelConfig and section.name not in MODEL_NAMES and _resized(section, changes):
        changes = {"name": "custom"} | changes  # a recipe's own size; a published one knows its own fields
    if kind is ModelConfig and changes.get("objective") in SINGLE_DECODER and section.objective not in SINGLE_DECODER:
        # The recipe's decoders belong to another objective; what was asked for by name still holds.
        changes = {"segments": 1, "did": False, "decoder_depth": None} | changes
    if kind is ModelConfig and "variant" in changes:
        changes = {"head_init": None} | changes  # each variant has a default of its own
    if kind is OptimConfig:
        if "base_lr" in changes and "lr" not in changes:
            changes["lr"] = 0.0  # a recipe's learning rate itself would make it a setting without an effect
        _drop_the_other(changes, "epochs", "steps")
        _drop_the_other(changes, "warmup_epochs", "warmup_steps")
        if {"warmup_epochs", "warmup_steps"} & set(changes):
            changes = {"warmup_share": 0.0} | changes
        elif changes.get("warmup_share"):
            changes |= {"warmup_epochs": 0.0, "warmup_steps": 0}
        if ("epochs" in changes or "steps" in changes) and not {"warmup_epochs", "warmup_steps"} & set(changes):
            changes |= _shorter_warmup(section, changes)
    return dataclasses.replace(section, **changes)


def _resized(section: ModelConfig, changes: Mapping[str, Any]) -> bool:
    return any(changes.get(name, getattr(section, name)) != getattr(section, name) for name in SIZE_FIELDS)


def _drop_the_other(changes: dict[str, Any], one: str, other: str) -> None:
    """A length given in one unit replaces the recipe's in the other."""
    if changes.get(one) and other not in changes:
        changes[other] = 0
    elif changes.get(other) and one not in changes:
        changes[one] = 0


def _shorter_warmup(section: OptimConfig, changes: dict[str, Any]) -> dict[str, Any]:
    """Keep the recipe's warm-up where it still fits into a shorter run, else a tenth of the run."""
    if changes.get("warmup_share", section.warmup_share):
        return {}
    epochs, steps = changes.get("epochs") or 0, changes.get("steps") or 0
    if epochs and section.warmup_epochs and section.warmup_epochs <= epochs / 2:
        return {}
    if steps and section.warmup_steps and 2 * section.warmup_steps <= steps:
        return {}
    return {"warmup_epochs": epochs / 10, "warmup_steps": int(steps // 10)}
