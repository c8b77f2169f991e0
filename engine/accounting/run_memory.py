"""Formulas give the memory of one rank of a whole run: a training step, and what the process holds beside it.

| part                                   | on a CPU                          | on a GPU                               |
|----------------------------------------|-----------------------------------|----------------------------------------|
| the process                            | torch, DeepSpeed, DALI: measured  | CUDA context and libraries: assumed    |
| model states, `memory.parameter_bytes` | all                               | all; without float32 under offloading  |
| average, teacher, perceptual network   | all                               | all                                    |
| the checkpoint that is being written   | a copy of what is saved           | in host memory                         |
| activations of a micro-batch           | all                               | all, and a tenth for the allocator     |
| batches of the loader                  | decoded windows, finished batches | the same                               |

`tests/engine/accounting/test_run_memory.py` compares the formulas with the peak of real processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mirl.engine.accounting.activations import VALUE_BYTES, activations, classifier_activations, segmenter_activations
from mirl.engine.accounting.flops import encoder_parameters, pretraining_parameters, segmenter_parameters
from mirl.engine.accounting.memory import BUCKET_VALUES, GIB, parameter_bytes, reduction_bytes
from mirl.engine.configuration.config import PretrainConfig
from mirl.engine.models.compute_choices import spares_matrix
from mirl.engine.models.config import ModelConfig

# Resident after a step of a tiny model, with torch 2.14, DeepSpeed 0.19.8 and DALI on Linux: pages of the libraries'
# files, and the process's own memory. After a fresh installation the pages are 0.35 GiB more, depending on how the page
# cache came by them; the kernel takes them back first.
LIBRARY_BYTES, OWN_BYTES = 0.5 * GIB, 0.6 * GIB
PROCESS_BYTES = LIBRARY_BYTES + OWN_BYTES
GPU_BYTES = 1.0 * GIB  # not measured: CUDA's context and the work space of its libraries
GPU_ALLOCATOR = 1.1  # work space of kernels and rounding of torch's allocator
# glibc keeps freed blocks of up to 32 MiB and does not always find a use for them. Small models held up to a quarter
# more than their activations take, 0.1 to 0.3 GiB; with MALLOC_TRIM_THRESHOLD_=131072 they do not, and are slower.
KEPT_SHARE, MOST_KEPT = 0.25, 0.4 * GIB
FINISHED_BATCHES = 4  # two that wait, one in use, one in the making
DECODED_BATCHES = 3  # two in DALI's pipeline, one handed out
DECODED_BYTES = 500 * 400 * 3  # a stored image of ImageNet, if nothing is known of the data
VGG_VALUES_PER_PIXEL = 264  # VGG-16 up to relu4_3 has so many
VGG_WEIGHTS = 7_635_264


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """A footprint is what a kind of run holds on a rank, whatever the micro-batch is.

    image_bytes: the most that an image of the micro-batch takes at a time. pixel_bytes: a finished image of the loader.
    model_bytes: further weights, all of them on every rank. saved_values: float32 values a parameter in a checkpoint.
    group: micro-batches are multiples of it.
    """

    parameters: int
    image_bytes: float
    pixel_bytes: float
    model_bytes: float = 0.0
    saved_values: int = 3
    group: int = 1


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A placement says where a model's states are: ZeRO stage and bucket, ranks, precision, kind of device."""

    zero_stage: int
    ranks: int
    precision: str
    on_gpu: bool
    bucket: int = BUCKET_VALUES
    offload: bool = False

    @classmethod
    def of(cls, ds_config: dict[str, Any], *, ranks: int, precision: str, on_gpu: bool) -> Placement:
        """Return the placement that a resolved DeepSpeed configuration asks for."""
        zero = ds_config["zero_optimization"]
        bucket = zero.get("reduce_bucket_size", BUCKET_VALUES)
        offload = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
        return cls(
            zero_stage=zero["stage"], ranks=ranks, precision=precision, on_gpu=on_gpu,
            # DeepSpeed itself refuses anything but a number.
            bucket=int(bucket) if isinstance(bucket, int | float) else BUCKET_VALUES, offload=offload,
        )  # fmt: skip


def run_bytes(
    footprint: Footprint,
    place: Placement,
    micro_batch: int,
    accumulation: int = 1,
    *,
    decoded_bytes: float = DECODED_BYTES,
) -> float:
    """Count the bytes of one rank's device: on a CPU all of the process, on a GPU what lies on the GPU.

    ``decoded_bytes``: one image of the data as it is decoded, before it is resized.
    """
    parameters, gradients = footprint.parameters, {"accumulation": accumulation, "bucket": place.bucket}
    states = parameter_bytes(parameters, place.zero_stage, place.ranks, place.precision, **gradients)
    reduced = reduction_bytes(
        parameters, place.zero_stage, place.ranks, place.precision, on_gpu=place.on_gpu, **gradients
    )
    if place.on_gpu and place.offload:
        states -= 12 / place.ranks * parameters
    work = max(micro_batch * footprint.image_bytes, reduced)
    loader = micro_batch * (FINISHED_BATCHES * footprint.pixel_bytes + DECODED_BATCHES * decoded_bytes)
    if place.on_gpu:
        return GPU_BYTES + GPU_ALLOCATOR * (states + footprint.model_bytes + work) + loader
    saved = 4 * footprint.saved_values * parameters / place.ranks
    kept = min(KEPT_SHARE * work, MOST_KEPT)
    return PROCESS_BYTES + states + footprint.model_bytes + saved + work + kept + loader


def pretraining_footprint(config: PretrainConfig, precision: str, *, on_gpu: bool, ranks: int = 1) -> Footprint:
    """Return the footprint of a pre-training run. UserError on an unknown form of activation checkpointing."""
    model, size = config.model, VALUE_BYTES[precision]
    pixels = model.image_height * model.image_width
    kept = activations(
        model, config.run.activation_checkpointing, precision, math=writes_out_attention(model, on_gpu=on_gpu),
        recompute=config.run.recompute_pointwise,
    )  # fmt: skip
    image, further = kept.peak + pixels * model.channels, 0.0
    if model.feature_loss:
        further += (4 + size) * encoder_parameters(model)
    if model.vgg_loss:
        further += size * VGG_WEIGHTS
        image += 2 * size * VGG_VALUES_PER_PIXEL * pixels  # before and after each ReLU
    parameters, averaged = pretraining_parameters(model), bool(config.optim.ema)
    if averaged:
        further += 4 / ranks * parameters
    return Footprint(
        parameters=parameters, image_bytes=image, pixel_bytes=pixels * model.channels, model_bytes=further,
        saved_values=4 if averaged else 3,
    )  # fmt: skip


def classifier_footprint(
    model: ModelConfig,
    classes: int,
    precision: str,
    *,
    on_gpu: bool,
    checkpointing: str | int = "none",
    recompute: bool = False,
    averaged: bool = False,
    paired: bool = False,
    ranks: int = 1,
) -> Footprint:
    """Return the footprint of a fine-tuning run of encoder ``model``, which has one segment and no decoders.

    averaged: an average of the weights is kept. paired: images of a micro-batch are mixed in pairs.
    """
    parameters = encoder_parameters(model) + (model.width + 1) * classes
    pixels = model.image_height * model.image_width * model.channels
    kept = classifier_activations(
        model, checkpointing, precision, math=writes_out_attention(model, on_gpu=on_gpu), recompute=recompute
    )
    # The average is in float32; while it is evaluated, the swapped-out weights stay beside it.
    average = (4 / ranks + VALUE_BYTES[precision]) * parameters if averaged else 0.0
    return Footprint(
        parameters=parameters,
        # In float32: the normalised image, a copy to write into, and the image that it is mixed with.
        image_bytes=kept.peak + pixels + 3 * 4 * pixels,
        pixel_bytes=pixels,
        model_bytes=average,
        saved_values=4 if averaged else 3,
        group=2 if paired else 1,
    )


def segmenter_footprint(
    model: ModelConfig,
    classes: int,
    head_channels: int,
    precision: str,
    *,
    on_gpu: bool,
    checkpointing: str | int = "none",
    recompute: bool = False,
    group: int = 1,
) -> Footprint:
    """Return the footprint of a segmentation run of encoder ``model``, at the size of its crops."""
    pixels = model.image_height * model.image_width
    kept = segmenter_activations(
        model, classes, head_channels, checkpointing, precision, math=writes_out_attention(model, on_gpu=on_gpu),
        recompute=recompute,
    )  # fmt: skip
    return Footprint(
        parameters=segmenter_parameters(model, classes, head_channels),
        image_bytes=kept.peak + pixels * (model.channels + 8),  # labels as int64
        pixel_bytes=pixels * (model.channels + 2),  # labels come as int16
        group=group,
    )


def writes_out_attention(model: ModelConfig, *, on_gpu: bool) -> bool:
    """Say whether attention keeps its weights.

    The backend "math" does, which a CPU chooses first for all but long sequences.
    """
    chosen = model.attention == "auto" and not on_gpu and not spares_matrix(model, on_gpu=on_gpu)
    return model.attention == "math" or chosen
