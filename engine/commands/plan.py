"""`mirl plan` predicts what a run would do on GPUs that are not here. Nothing that it prints is measured."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mirl.engine.accounting.devices import DEVICES, Device, device_named
from mirl.engine.configuration.config import AUTO, PretrainConfig
from mirl.engine.configuration.flags import Parser
from mirl.engine.pretraining.command_line import parse_pretrain
from mirl.errors import UserError

if TYPE_CHECKING:
    from mirl.engine.accounting.forecast import Forecast, StepForecast
    from mirl.engine.models import ModelConfig

IMAGENET_IMAGES = 1_281_167
SUFFIXES = {"K": 1e3, "M": 1e6, "G": 1e9}
DESCRIPTION = """\
Predict speed, utilisation, memory and length of a pre-training run on GPUs that need not be here. A training step runs
on tensors without values; its operators are priced by a table of devices. Every flag of `mirl pretrain` is taken too:
--recipe NAME, --batch-size 2048, --model.NAME ... See docs/plan.md for what is assumed."""


def main(argv: Sequence[str]) -> int:
    """Print the prediction; return the exit code. UserError for a flag that does not fit."""
    parser = Parser(
        prog="mirl plan", description=DESCRIPTION, allow_abbrev=False,
        usage="mirl plan [--recipe NAME] [--gpu NAME] [--gpus N] [--images N] [--attention-kernels NAME] [--json] "
              "[flags of mirl pretrain]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--gpu", default="H100", metavar="NAME", help=f"one of {', '.join(DEVICES)} [H100]")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="how many, eight in a node [1]")
    parser.add_argument(
        "--images", type=_count, default=IMAGENET_IMAGES, metavar="N",
        help=f"images of the data set, e.g. 1.28M [{IMAGENET_IMAGES}, ImageNet-1K]",
    )  # fmt: skip
    parser.add_argument(
        "--attention-kernels", default="flash", choices=("flash", "own"),
        help="flash: FlashAttention 2; own: ours, which a run on a GPU may choose by measuring [flash]",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="machine-readable")
    known, rest = parser.parse_known_args(argv)
    device = device_named(known.gpu)
    if known.gpus < 1:
        raise UserError(f"gpus is {known.gpus}: give 1 or more")
    config = parse_pretrain(rest)
    if config.run.precision == "fp32":
        raise UserError("precision is fp32: mirl plan predicts runs in bf16; leave the flag out")
    found, remarks = plan(config, device, gpus=known.gpus, images=known.images, attention=known.attention_kernels)
    if known.json:
        print(json.dumps(found.as_dict() | {"recipe": config.recipe, "remarks": remarks}, indent=2))
    else:
        print("\n".join(describe(found, config, device, remarks)))
    return 0


def _count(text: str) -> int:
    """Read a number of images: 1281167, 1.28M, 50k."""
    scale = SUFFIXES.get(text[-1:].upper(), 1.0)
    try:
        images = float(text[:-1] if scale != 1 else text) * scale
        if not 1 <= images < 1e15:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of images: give e.g. 1281167 or 1.28M") from None
    return round(images)


def plan(
    config: PretrainConfig, device: Device, *, gpus: int, images: int, attention: str = "flash"
) -> tuple[Forecast, list[str]]:
    """Predict ``config`` on ``gpus`` GPUs and a data set of ``images``; remark what the prediction leaves out.

    attention: "flash" or "own", the kernels that compute it.

    Without a given micro-batch the prediction has that of such a run. UserError if the batch cannot be shared among the
    GPUs.
    """
    # These imports come late, so that --help and a wrong flag answer at once.
    import torch

    from mirl.engine.accounting.fake_step import FLASH, OWN
    from mirl.engine.accounting.flops import training_flops_per_image
    from mirl.engine.accounting.forecast import FREE_SHARE, Forecast, forecast_step
    from mirl.engine.accounting.machines import largest_fitting, micro_batches
    from mirl.engine.accounting.memory import GIB
    from mirl.engine.accounting.run_memory import Placement, pretraining_footprint, run_bytes
    from mirl.engine.distributed.ds_config import read_ds_config, resolve_batch, resolve_ds_config
    from mirl.engine.models import ExactSkips
    from mirl.engine.training.computing import bare_model
    from mirl.engine.training.image_sizes import StepSizes

    model, optim, run = config.model, config.optim, config.run
    micro_batch, accumulation = resolve_batch(config, gpus)
    share, free = micro_batch * accumulation, FREE_SHARE * device.memory_gib * GIB
    ds_config = resolve_ds_config(
        read_ds_config(run.deepspeed_config), config, micro_batch=micro_batch, accumulation=accumulation,
        precision="bf16", device=torch.device("cuda"),
    )  # fmt: skip
    place = Placement.of(ds_config, ranks=gpus, precision="bf16", on_gpu=True)
    footprint = pretraining_footprint(config, "bf16", on_gpu=True)

    def need(micro: int) -> float:
        return run_bytes(footprint, place, micro, share // micro)

    fitting = largest_fitting(micro_batches(share, footprint.group), need, free, on_gpu=True)
    if not optim.given_micro_batch:
        micro_batch, accumulation = fitting, share // fitting

    def forecast(model: ModelConfig) -> StepForecast:
        return forecast_step(
            lambda: bare_model(model, run), device, gpus=gpus, micro_batch=micro_batch, accumulation=accumulation,
            stage=place.zero_stage, attention=OWN if attention == "own" else FLASH,
            one_pass=_steps_in_one_pass(config, ds_config),
        )  # fmt: skip

    step = forecast(model)
    sizes = StepSizes.of(config, optim.steps or max(1, round(optim.epochs * images / optim.batch_size)))
    # The length is that of so many images of the whole size.
    steps_s = [share * (step if each == model else forecast(each)).step_s for each, share in sizes.shares()]
    length = sum(steps_s) / step.step_s if sizes else 1.0
    found = Forecast.make(
        step, device, micro_batch=micro_batch, accumulation=accumulation,
        flops_per_image=training_flops_per_image(model, ExactSkips()),
        plain_flops_per_image=training_flops_per_image(model), memory_gib=need(micro_batch) / GIB,
        trained_images=length * (optim.steps * optim.batch_size or optim.epochs * images),
    )  # fmt: skip
    remarks = ["attention by our own kernels, where they can: no GPU has run them yet"] if attention == "own" else []
    if sizes:
        remarks.append(
            f"image sizes {' '.join(config.data.image_sizes)}: the length is of all of them, {100 * length:.0f} % of "
            "that of one size; the rest is of the whole size"
        )
    if not found.fits:
        mend = f"--micro-batch {fitting} does" if need(fitting) <= free else "no micro-batch does"
        remarks.append(f"micro-batch {micro_batch} does not fit into {device.memory_gib:g} GiB: {mend}")
    extra = [name for name in ("feature_loss", "vgg_loss") if getattr(model, name)]
    if extra:
        remarks.append(f"passes of the networks behind {' and '.join(extra)} are left out")
    return found, remarks


def _steps_in_one_pass(config: PretrainConfig, ds_config: dict[str, Any]) -> bool:
    """Say whether a run on a GPU would measure the optimiser in one pass, which moves fewer bytes."""
    zero = ds_config["zero_optimization"]
    flat = config.run.flat_gradients and zero["stage"] in (1, 2) and "offload_optimizer" not in zero
    return flat and config.run.choices in ("auto", "measure")


def describe(found: Forecast, config: PretrainConfig, device: Device, remarks: Sequence[str]) -> list[str]:
    """Return the lines that `mirl plan` prints."""
    optim, shares = config.optim, sorted(found.shares.items(), key=lambda item: -item[1])
    batch = f"{found.micro_batch} x {found.accumulation} accumulation x {found.gpus} GPUs"
    batch += ", with which auto begins" if optim.micro_batch == AUTO else ""
    busy = "device" if found.device_ms >= found.host_ms else "host"
    length = f"{optim.steps} steps" if optim.steps else f"{optim.epochs:g} epochs"
    rows: list[tuple[str, Any]] = [
        ("run", f"recipe {config.recipe}, model {config.model.name}, {found.gpus} x {found.gpu}, bf16"),
        ("batch", f"{optim.batch_size} = {batch}"),
        ("step", f"{found.step_ms:.1f} ms, bound by the {busy}: device {found.device_ms:.1f} ms, host "
                 f"{found.host_ms:.1f} ms, {found.link_ms:.1f} ms of traffic on top"),
        ("speed", f"{found.images_per_s:.0f} images/s; MFU {found.mfu_percent:.1f} %, of the plain form's FLOPs "
                  f"{found.plain_mfu_percent:.1f} %"),
        ("memory", f"{found.memory_gib:.1f} of {found.memory_of_gpu_gib:.0f} GiB a GPU"),
        ("length", f"{length}: " + ("unknown" if found.days is None else f"{found.days:.2f} days")),
        ("device time", ", ".join(f"{kind} {share:.0f} %" for kind, share in shares if share >= 0.5)),
        ("a step has", f"{found.launches} launches, {found.bytes_gb:.1f} GB moved, "
                       f"{found.bytes_gb - found.optimiser_gb:.1f} without the optimiser"),
        ("GPU figures", f"{device.peak_flops / 1e12:g} TFLOP/s bf16, {device.bandwidth / 1e9:g} GB/s: {device.source}"),
    ]  # fmt: skip
    lines = ["A prediction from counted operators: nothing below was measured."]
    lines += [f"{name:<12} {text}" for name, text in rows]
    return lines + [f"{'note':<12} {remark}" for remark in remarks]
