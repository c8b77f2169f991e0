"""Find and read the DeepSpeed JSON, check it against our own configuration, and fill in its "auto" values.

Training settings (batch, learning rate, clipping, length) are ours; ZeRO, precision and communication are the file's. A
value that stands in both and disagrees is refused by name.
"""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from mirl.engine.configuration.config import Config
from mirl.errors import UserError

NAMES = ("zero1", "zero2", "zero3", "zero2_offload")
OURS = {
    "optimizer": "--base-lr, --betas, --weight-decay",
    "scheduler": "--schedule, --warmup-epochs",
    "activation_checkpointing": "--activation-checkpointing",
    "fp16": "--precision bf16 or fp32 (fp16 is not supported: its range is too small for deep encoders)",
    "amp": "--precision",
}
# The sections that this module reads, outer ones first, with an example of each.
SECTIONS = {
    "zero_optimization": 'e.g. {"stage": 2}',
    "zero_optimization.offload_optimizer": 'e.g. {"device": "cpu"}',
    "zero_optimization.offload_param": "or leave it out",
    "bf16": 'e.g. {"enabled": true}',
    "data_types": 'e.g. {"grad_accum_dtype": "fp32"}',
    "timers": 'e.g. {"throughput": {"enabled": false}}',
    "timers.throughput": 'e.g. {"enabled": false}',
}


def read_ds_config(name: str) -> dict[str, Any]:
    """Return the JSON object in file ``name``, or in the shipped file of that name (``zero2``).

    Raises:
        UserError: no such file, not JSON, not an object, or another value in the place of a section.
    """
    path = Path(name)
    if path.is_file():
        text = _text(path)
    elif name in NAMES:
        text = _shipped(name)
    elif path.parent.name == "ds_configs" and path.stem in NAMES and path.suffix == ".json":
        text = _shipped(path.stem)  # `--deepspeed_config ds_configs/zero2.json` away from the checkout
    else:
        raise UserError(f"deepspeed_config is {name!r}: no such file; give a path, or one of {', '.join(NAMES)}")
    try:
        values = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_refuse_doubles)
    except (json.JSONDecodeError, RecursionError) as error:
        hint = " (JSON has no comments: take them out)" if re.search(r"//|/\*|^\s*#", text, re.MULTILINE) else ""
        raise UserError(f"deepspeed_config {name} is not JSON: {error}{hint}") from error
    except UserError as error:
        raise UserError(f"deepspeed_config {name} {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"deepspeed_config {name} holds a {type(values).__name__}, not a JSON object")
    _require_sections(values, name)
    return values


def _text(path: Path) -> str:
    """Return the text of a file in UTF-8 or, with a byte order mark, UTF-16."""
    content = path.read_bytes()
    try:
        return content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(
            f"deepspeed_config {path} is not UTF-8 text: byte {content[error.start]:#04x} in line {line}; save it as "
            "UTF-8"
        ) from error


def _refuse_constant(text: str) -> None:
    raise UserError(f"holds {text}: give a finite number")


def _refuse_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object, in which DeepSpeed too allows every key once."""
    keys = [key for key, _ in pairs]
    if doubled := {key for key in keys if keys.count(key) > 1}:
        raise UserError(f"holds {min(doubled)!r} twice in one object: keep one of them")
    return dict(pairs)


def _require_sections(values: dict[str, Any], name: str) -> None:
    """Raise UserError if another value stands in the place of a section that this module reads."""
    for path, example in SECTIONS.items():
        content: Any = values
        for key in path.split("."):
            content = content.get(key, {})
            if content is None and key != path.split(".")[0]:
                content = {}  # DeepSpeed's own way of saying that there is no offload
            if not isinstance(content, dict):
                raise UserError(f"deepspeed_config {name} has {path} {json.dumps(content)}: give an object, {example}")
    stage = values.get("zero_optimization", {}).get("stage")
    if isinstance(stage, bool | float | str):
        raise UserError(
            f"deepspeed_config {name} has zero_optimization.stage {json.dumps(stage)}: give the number 1, 2 or 3"
        )
    enabled = values.get("bf16", {}).get("enabled", "auto")
    if not isinstance(enabled, bool) and enabled != "auto":
        raise UserError(f'deepspeed_config {name} has bf16.enabled {json.dumps(enabled)}: give true, false or "auto"')


def _shipped(name: str) -> str:
    """Return the text of a shipped file: ds_configs/ is a folder of the checkout, and of a wheel too."""
    return resources.files("mirl.ds_configs").joinpath(f"{name}.json").read_text()


def resolve_batch(config: Config, world_size: int) -> tuple[int, int]:
    """Return ``(micro_batch, accumulation)`` so that micro_batch * accumulation * world_size is the effective batch.

    Raises:
        UserError: the effective batch cannot be shared equally.
    """
    batch, micro = config.optim.batch_size, config.optim.given_micro_batch
    if batch % world_size:
        raise UserError(f"batch_size is {batch} and there are {world_size} ranks: give a multiple of {world_size}")
    share = batch // world_size
    if not micro:
        return share, 1
    if share % micro:
        raise UserError(
            f"micro_batch is {micro} and each of {world_size} ranks has {share} images of batch_size {batch}: give a "
            f"divisor of {share}"
        )
    return micro, share // micro


def resolve_precision(requested: str, device: torch.device) -> tuple[str, str]:
    """Return ``(precision, reason)``. ``auto`` becomes bf16 if the device computes in it at full speed."""
    if requested != "auto":
        return requested, "as asked"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", f"{torch.cuda.get_device_name(device)} computes in bf16"
        return "fp32", f"{torch.cuda.get_device_name(device)} has no bf16 units"
    if torch.cpu._is_amx_tile_supported():
        return "bf16", "this CPU has AMX"
    return "fp32", "this CPU has no AMX"


def resolve_ds_config(
    values: dict[str, Any],
    config: Config,
    *,
    micro_batch: int,
    accumulation: int,
    precision: str,
    device: torch.device,
) -> dict[str, Any]:
    """Return ``values`` with every "auto" filled in from our configuration.

    Raises:
        UserError: a value disagrees with our configuration, a section of the file belongs there, or the ZeRO stage is
        not 1 to 3.
    """
    name = config.run.deepspeed_config
    values = json.loads(json.dumps(values))
    for section, flags in OURS.items():
        content = values.get(section)
        if content and not (isinstance(content, dict) and content.get("enabled") is False):
            raise UserError(f"deepspeed_config {name} has a section {section!r}: remove it and use {flags}")
    ours = {
        "train_batch_size": (config.optim.batch_size, "batch_size"),
        "train_micro_batch_size_per_gpu": (micro_batch, "micro_batch"),
        "gradient_accumulation_steps": (accumulation, "batch_size / (micro_batch * ranks)"),
        "gradient_clipping": (config.optim.clip_grad, "clip_grad"),
    }
    for key, (value, field) in ours.items():
        if values.get(key, "auto") not in ("auto", value):
            raise UserError(
                f"deepspeed_config {name} has {key} {values[key]} and {field} is {value}: make them equal or write "
                '"auto"'
            )
        values[key] = value
    bf16 = values.setdefault("bf16", {"enabled": "auto"})
    if bf16.get("enabled", "auto") not in ("auto", precision == "bf16"):
        if config.run.precision != "auto":
            raise UserError(
                f"deepspeed_config {name} has bf16.enabled {bf16['enabled']} and precision is "
                f"{config.run.precision}: make them agree"
            )
    else:
        bf16["enabled"] = precision == "bf16"
    zero = values.get("zero_optimization", {})
    if zero.get("stage") not in (1, 2, 3):
        raise UserError(f"deepspeed_config {name} has zero_optimization.stage {zero.get('stage')}: give 1, 2 or 3")
    offload = zero.get("offload_optimizer") or {}
    if offload.get("pin_memory") == "auto":
        offload["pin_memory"] = device.type == "cuda"
    if offload.get("device") == "nvme" or (zero.get("offload_param") or {}).get("device", "none") != "none":
        raise UserError(
            f"deepspeed_config {name} offloads to NVMe or offloads parameters: only offload_optimizer to cpu is "
            "supported"
        )
    values.setdefault("steps_per_print", 10**9)
    # DeepSpeed's own timer waits for the device before and after each pass; the log's speed needs no such wait.
    values.setdefault("timers", {}).setdefault("throughput", {"enabled": False})
    _refuse_auto(values, name, ())
    return values


def _refuse_auto(values: Any, name: str, path: tuple[str, ...]) -> None:
    if values == "auto":
        raise UserError(
            f'deepspeed_config {name} has "auto" for {".".join(path)}, which only the file can decide: give a value'
        )
    if isinstance(values, dict):
        for key, value in values.items():
            _refuse_auto(value, name, (*path, key))
