"""The DeepSpeed JSON: found, read, checked against our own configuration, and its "auto" values filled in.

Training settings (batch, learning rate, clipping, length) are ours; ZeRO, precision and communication are the file's. A
value that stands in both and disagrees is refused by name.
"""

from __future__ import annotations

import json
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


def read_ds_config(name: str) -> dict[str, Any]:
    """The JSON object in file ``name``, or in the shipped file of that name (``zero2``).

    Raises:
        UserError: no such file, not JSON, not an object.
    """
    path = Path(name)
    if path.is_file():
        text = path.read_text()
    elif name in NAMES:
        text = _shipped(name)
    elif path.parent.name == "ds_configs" and path.stem in NAMES and path.suffix == ".json":
        text = _shipped(path.stem)  # `--deepspeed_config ds_configs/zero2.json` away from the checkout
    else:
        raise UserError(f"deepspeed_config is {name!r}: no such file; give a path, or one of {', '.join(NAMES)}")
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"deepspeed_config {name} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"deepspeed_config {name} holds a {type(values).__name__}, not a JSON object")
    return values


def _shipped(name: str) -> str:
    """The text of a shipped file: ds_configs/ is a folder of the checkout, and of a wheel too."""
    return resources.files("mirl.ds_configs").joinpath(f"{name}.json").read_text()


def resolve_batch(config: Config, world_size: int) -> tuple[int, int]:
    """``(micro_batch, accumulation)`` so that micro_batch * accumulation * world_size is the effective batch.

    Raises:
        UserError: the effective batch cannot be shared equally.
    """
    batch, micro = config.optim.batch_size, config.optim.micro_batch
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
    """``(precision, reason)`` for ``auto``: bf16 where the device computes in it at full speed."""
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
    """``values`` with every "auto" filled in from ours.

    Raises:
        UserError: a value disagrees with ours, a section of the file belongs to our configuration, or the ZeRO stage is
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
    offload = zero.get("offload_optimizer", {})
    if offload.get("pin_memory") == "auto":
        offload["pin_memory"] = device.type == "cuda"
    if offload.get("device") == "nvme" or zero.get("offload_param", {}).get("device", "none") != "none":
        raise UserError(
            f"deepspeed_config {name} offloads to NVMe or offloads parameters: only offload_optimizer to cpu is "
            "supported"
        )
    values.setdefault("steps_per_print", 10**9)
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
