"""Measure the time of a step on this machine, by a few real passes on synthetic images."""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

from mirl.engine.configuration.config import Config, PretrainConfig
from mirl.engine.distributed.launch import cores_per_rank
from mirl.engine.models import MIRL, ModelConfig
from mirl.engine.training.computing import set_computation
from mirl.engine.training.optimizer import build_optimizer
from mirl.engine.transfer.classification.classifier import Classifier

PASS_SECONDS = 1.5  # a pass of more than one image takes about this long at most
PASSES = 3


def step_seconds(
    config: Config, model: ModelConfig, classes: int, precision: str, device: torch.device, micro: int, batch: int
) -> tuple[float, int]:
    """Return ``(seconds of a step, images of a measured pass)``, without the loader and the compiled regions."""
    if device.type == "cpu":
        torch.set_num_threads(config.run.cpu_threads or cores_per_rank(1))
    torch.manual_seed(config.run.seed)
    network = MIRL(model) if isinstance(config, PretrainConfig) else Classifier(model, num_classes=classes)
    set_computation(network, config.run, device)
    network.to(device, torch.bfloat16 if precision == "bf16" else torch.float32).train()
    generator = torch.Generator().manual_seed(config.run.seed)

    def one_pass(count: int) -> float:
        shape = (count, model.image_height, model.image_width, model.channels)
        images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device)
        begin = _now(device)
        network.trial_loss(images, generator).backward()
        seconds = _now(device) - begin
        network.zero_grad(set_to_none=True)
        return seconds

    one_pass(1)  # chooses the attention
    # Images double until a pass takes long enough, or is the run's own: few images at a time cost more each.
    count, seconds = 1, one_pass(1)
    while count < micro and 2 * seconds < PASS_SECONDS:
        count = min(micro, 2 * count)
        seconds = one_pass(count)
    seconds = statistics.median(one_pass(count) for _ in range(PASSES))
    return batch / count * seconds + _optimizer_seconds(config, network, device), count


def _optimizer_seconds(config: Config, network: nn.Module, device: torch.device) -> float:
    """Time AdamW on the values of ``network`` as one flat float32 tensor, as ZeRO has them, or Muon on each."""
    if config.optim.optimizer == "adamw":
        values = sum(parameter.numel() for parameter in network.parameters())
        network = nn.ParameterList([nn.Parameter(torch.zeros(values, device=device))])
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer = build_optimizer(network, config.optim, device)
    optimizer.step()
    begin = _now(device)
    optimizer.step()
    return _now(device) - begin


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
