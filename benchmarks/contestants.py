"""Who runs in `bench_step`: the engine's model and what it is compared with, as closures over one set of parameters.

| name            | what it is                                                                        |
|-----------------|-----------------------------------------------------------------------------------|
| `ours`          | the engine's model, eager, with its defaults for the device                       |
| `ours_compiled` | the same with compiled regions                                                    |
| `eager_math`    | the eager reference, attention written out                                        |
| `eager_sdpa`    | the eager reference with scaled_dot_product_attention                             |
| `compile`       | `eager_sdpa` under torch.compile                                                  |
| `mae`           | Hugging Face's ViTMAEForPreTraining with SDPA, of the same size; for G = 1 alone. |
|                 | (timm has no MAE pre-training.)                                                   |
| `engine`        | a step as a run takes it: `TrainEngine` under ZeRO-2 on one rank, with its own    |
|                 | optimiser; in bfloat16 where the others run under autocast. Only when asked for.  |
|                 | `engine_compiled`: the same with compiled regions.                                |

All but `mae` and `engine` share their Parameters, gradients and optimiser, so a large model is in memory once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mirl.engine.configuration.config import DataConfig, OptimConfig, PretrainConfig, RunConfig
from mirl.engine.distributed.ds_config import read_ds_config, resolve_ds_config
from mirl.engine.models import MIRL, Execution, ModelConfig
from mirl.engine.models.pixels import normalise_images
from mirl.engine.training.compiling import compile_regions
from mirl.engine.training.optimizer import build_optimizer
from tests.support.oracle import ReferenceMIRL

NAMES = ("ours", "ours_compiled", "eager_math", "eager_sdpa", "compile", "mae")
ON_REQUEST = ("engine", "engine_compiled")
PRECISIONS = ("fp32", "bf16", "autocast")


@dataclass(kw_only=True)
class Contestant:
    """``loss(images, noise)`` is a scalar with a graph; ``prepare`` is called before a run of its steps; ``step``,
    where given, is all of a step, and needs neither.
    """

    name: str
    loss: Callable[[Tensor, Tensor], Tensor]
    prepare: Callable[[], None] = lambda: None
    step: Callable[[Tensor, Tensor], None] | None = None


class MasterAdamW:
    """AdamW on float32 copies of bfloat16 parameters, as a mixed-precision engine keeps them; plain for float32 ones.

    Gradients are cast as a whole, the step is one fused kernel, and the result is cast back: bytes as in ZeRO on one
    rank, without its hooks and buckets.
    """

    def __init__(self, model: nn.Module, optim: Any, device: torch.device) -> None:
        self.parameters = list(model.parameters())
        self.copies = self.parameters[0].dtype != torch.float32
        self.adamw = build_optimizer(model, optim, device)
        self.masters = self.parameters
        if self.copies:
            self.masters = [parameter.detach().float() for parameter in self.parameters]
            place = {id(parameter): master for parameter, master in zip(self.parameters, self.masters, strict=True)}
            for group in self.adamw.param_groups:
                group["params"] = [place[id(parameter)] for parameter in group["params"]]

    @torch.no_grad()
    def step(self) -> None:
        if self.copies:
            gradients = [torch.empty_like(master) for master in self.masters]
            torch._foreach_copy_(gradients, [parameter.grad for parameter in self.parameters])  # few launches
            for parameter, master, gradient in zip(self.parameters, self.masters, gradients, strict=True):
                master.grad, parameter.grad = gradient, None
        self.adamw.step()
        if self.copies:
            torch._foreach_copy_(self.parameters, self.masters)
            for master in self.masters:
                master.grad = None
        else:
            for parameter in self.parameters:
                parameter.grad = None


def reference_sharing_weights(model: MIRL, attention: str) -> ReferenceMIRL:
    """The eager reference whose Parameters are those of ``model``."""
    with torch.device("meta"):
        reference = ReferenceMIRL(model.config, attention)
    reference.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    reference.pos_embed = model.encoder.pos_embed
    reference.decoder_pos_embed = model.decoder_pos_embed
    for name, buffer in reference.named_buffers():
        assert not buffer.is_meta, f"{name} has no value"
    return reference


def make_contestants(
    config: ModelConfig, names: tuple[str, ...], batch: int, device: torch.device, precision: str
) -> tuple[MIRL, list[Contestant], dict[str, str]]:
    """The engine's model, those of ``names`` that can run, and for the others the reason why not."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}: choose one of {', '.join(PRECISIONS)}")
    torch.manual_seed(0)
    model = MIRL(config).to(device, torch.bfloat16 if precision == "bf16" else torch.float32)
    made: list[Contestant] = []
    left_out: dict[str, str] = {}
    for name in names:
        if name == "ours":
            made.append(Contestant(name=name, loss=_loss_of(model), prepare=partial(model.set_regions, None)))
        elif name == "ours_compiled":
            if precision == "autocast":
                left_out[name] = "the trial step of compiled regions runs without autocast"
                continue
            choice = compile_regions(model, batch, device)
            if not choice.on:
                left_out[name] = choice.reason
                continue
            made.append(Contestant(name=name, loss=_loss_of(model), prepare=partial(model.set_regions, model.regions)))
        elif name in ("eager_math", "eager_sdpa"):
            made.append(Contestant(name=name, loss=_loss_of(reference_sharing_weights(model, name[6:]))))
        elif name == "compile":
            made.append(Contestant(name=name, loss=_loss_of(torch.compile(reference_sharing_weights(model, "sdpa")))))
        elif name in ON_REQUEST:
            made.append(whole_engine(config, batch, device, precision, compiled=name != "engine"))
        elif name == "mae":
            mae, reason = hugging_face_mae(config, device, next(model.parameters()).dtype)
            if mae is None:
                left_out[name] = reason
            else:
                made.append(Contestant(name=name, loss=mae))
        else:
            raise ValueError(f"contestant is {name!r}: choose one of {', '.join(NAMES + ON_REQUEST)}")
    return model, made, left_out


def whole_engine(
    config: ModelConfig, batch: int, device: torch.device, precision: str, *, compiled: bool = False
) -> Contestant:
    """A model of its own behind DeepSpeed, alone in its process group.

    Raises RuntimeError if it cannot be compiled.
    """
    from mirl.engine.distributed.ds_engine import TrainEngine
    from mirl.engine.distributed.launch import join

    if not torch.distributed.is_initialized():
        join()
    kind = "fp32" if precision == "fp32" else "bf16"
    settings = PretrainConfig(
        recipe="bench", model=config, data=DataConfig(), optim=OptimConfig(batch_size=batch, steps=1),
        run=RunConfig(precision=kind),
    )  # fmt: skip
    values = resolve_ds_config(
        read_ds_config("zero2"), settings, micro_batch=batch, accumulation=1, precision=kind, device=device
    )
    torch.manual_seed(0)
    model = MIRL(config).to(device)
    model.set_execution(Execution.for_device(device))
    engine = TrainEngine(model, build_optimizer(model, settings.optim, device), values)
    if compiled:
        choice = compile_regions(engine.module, batch, device)
        if not choice.on:
            raise RuntimeError(f"no compiled regions: {choice.reason}")

    def step(images: Tensor, noise: Tensor) -> None:
        # The recipes' autocast is none: the weights themselves are bfloat16.
        with torch.autocast(device.type, enabled=False):
            engine.backward(engine.forward(images, noise=noise).loss)
            engine.step(settings.optim.peak_lr)

    def loss(images: Tensor, noise: Tensor) -> Tensor:
        with torch.autocast(device.type, enabled=False), torch.no_grad():
            return engine.module(images, noise=noise).loss

    return Contestant(name="engine_compiled" if compiled else "engine", loss=loss, step=step)


def _loss_of(model: Callable[..., Any]) -> Callable[[Tensor, Tensor], Tensor]:
    if isinstance(model, MIRL):
        return lambda images, noise: model(images, noise=noise).loss
    return lambda images, noise: model(images, noise).loss


def hugging_face_mae(
    config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> tuple[Callable[[Tensor, Tensor], Tensor] | None, str]:
    """``(loss, "")`` of a MAE of the same size, or ``(None, reason)``."""
    if config.objective != "mae":
        return None, "the model is no MAE (G = 1, no DID)"
    try:
        from transformers import ViTMAEConfig, ViTMAEForPreTraining
    except ImportError:
        return None, "transformers is not installed (pip install transformers)"
    theirs = ViTMAEForPreTraining._from_config(
        ViTMAEConfig(
            hidden_size=config.width, num_hidden_layers=config.depth, num_attention_heads=config.heads,
            intermediate_size=config.mlp_width, image_size=config.image_height, patch_size=config.patch_size,
            num_channels=config.channels, decoder_hidden_size=config.decoder_width,
            decoder_num_hidden_layers=config.decoder_depth, decoder_num_attention_heads=config.decoder_heads,
            decoder_intermediate_size=config.decoder_mlp_width, mask_ratio=config.mask_ratio,
            norm_pix_loss=config.norm_pix, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        ),
        attn_implementation="sdpa",
    ).to(device, dtype)  # fmt: skip
    theirs.train()

    def loss(images: Tensor, noise: Tensor) -> Tensor:
        pixels = normalise_images(images, config.mean, config.std, dtype).contiguous()
        return theirs(pixels, noise=noise).loss

    loss.model = theirs
    return loss, ""
