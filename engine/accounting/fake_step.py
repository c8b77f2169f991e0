"""Run one training step of any model on fake tensors: every operator that a GPU would run, without one and in seconds.

Fake tensors have shapes and no values. The step runs as on a GPU: Triton kernels through their registered shapes,
fused norms and GELUs, and FlashAttention or our kernels for attention. torch's autograd engine asks the driver for its
streams as soon as a CUDA tensor has a gradient, so a whole step runs on fake CPU tensors with the dispatch of a GPU.
The forward pass alone runs on fake CUDA tensors too, which show the tensors that leave the device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mirl.engine.accounting.operators import WAITS, Operator, read_operator
from mirl.engine.distributed.flat_gradients import copies_of_gradients
from mirl.engine.models.compute_choices import ComputeChoices
from mirl.engine.models.execution import Execution
from mirl.kernels.attention import AttentionBackend
from mirl.kernels.dispatch import as_on_a_gpu

FLASH = AttentionBackend("flash", "the dry run's, whatever a GPU would choose")
OWN = AttentionBackend("own", "the dry run's, as a GPU may choose", otherwise="flash")


@dataclass
class FakeStep:
    """The step records what the operators did.

    ``operators``: how often each ran. ``off_device``: operators that touched a tensor of another device. ``waits``:
    operators for which the host would wait. ``large_fp32``: operators on float32 tensors of a million values.
    ``gradients``: parameters by name, and the fault of each gradient, "" for none.
    """

    batch: int
    parameters: list[int] = field(default_factory=list)
    operators: Counter[Operator] = field(default_factory=Counter)
    off_device: list[str] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)
    large_fp32: Counter[str] = field(default_factory=Counter)
    gradients: dict[str, str] = field(default_factory=dict)

    @property
    def launches(self) -> int:
        return sum(count * operator.launches for operator, count in self.operators.items())

    @property
    def bytes(self) -> float:
        return sum(count * operator.bytes for operator, count in self.operators.items())

    @property
    def flops(self) -> float:
        return sum(count * operator.flops for operator, count in self.operators.items())


def fake_step(
    build: Callable[[], ComputeChoices], batch: int, *, device: str = "cpu", dtype: torch.dtype = torch.bfloat16,
    attention: AttentionBackend = FLASH,
) -> FakeStep:  # fmt: skip
    """Take a step of ``batch`` images with the model that ``build`` makes, and list its operators.

    ``build`` runs on the meta device, so that nothing is allocated. If it sets no execution, the model gets that of a
    GPU. ``device``: "cuda" takes the forward pass alone. Pixels are uint8 [B, H, W, C]. ``attention``: `FLASH` or
    `OWN`.
    """
    with torch.device("meta"):
        model = build().train()
    if model.execution is None:
        model.set_execution(Execution.for_device(torch.device("cuda")))
    config = model.config
    step = FakeStep(batch, [parameter.numel() for parameter in model.parameters()])
    with ExitStack() as entered:
        entered.enter_context(FakeTensorMode())
        entered.enter_context(as_on_a_gpu())
        _make_fake(model, device, dtype)
        # The device of a parameter has its number ("cuda:0"), as in the first operator of a CUDA step.
        place = next(model.parameters()).device
        model.set_attention(attention, place, dtype)
        images = torch.empty(
            (batch, config.image_height, config.image_width, config.channels), dtype=torch.uint8, device=device
        )
        recorder = entered.enter_context(_Recorder(step, place))
        loss = model.trial_loss(images, torch.Generator())
        if device != "cuda":
            recorder.phase = "backward"
            loss.backward()
            step.gradients = {name: _fault(parameter) for name, parameter in model.named_parameters()}
    return step


def optimiser_operators(
    parameters: Sequence[int], ranks: int, *, accumulation: int = 1, one_pass: bool = False
) -> Counter[Operator]:
    """List the operators that follow the backward passes of a step, on one of ``ranks`` under ZeRO 1 or 2 in bf16.

    ``parameters``: values of each, in the order of the model. ``one_pass``: as `mirl.kernels.flat_adamw` steps.

    Bytes a value: the copy into the flat buffer moves 4, or 10 if micro-batches add up in float32; the gradient then
    has 2 or 4. For the rank's share, the gradient to float32 moves 6, its norm 4, AdamW reads 16 and writes 12, the
    weight to bf16 moves 6. In one pass, the norm reads the gradient, and the pass reads it again with 12 more and
    writes 14.
    """
    total = sum(parameters)
    share, copies = total / ranks, copies_of_gradients(parameters, on_gpu=True)
    copied, gradient = (total * 4, 2) if accumulation == 1 else (total * 10, 4)
    groups = 2  # with and without weight decay
    passes = (("gradients_to_fp32", 6), ("norm", 4), ("adamw", 28), ("weights_to_bf16", 6))
    if one_pass:
        passes = (("norm", gradient), ("flat_adamw", gradient + 26))
    found: Counter[Operator] = Counter()
    found[Operator("copy_gradients", "step", "optimiser", 1, copied / copies, 0.0)] = copies * accumulation
    for name, each in passes:
        found[Operator(name, "step", "optimiser", 1, share * each / groups, 0.0)] = groups
    return found


class _Recorder(TorchDispatchMode):
    def __init__(self, step: FakeStep, device: torch.device) -> None:
        super().__init__()
        self.step, self.device, self.phase = step, device, "forward"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func._schema.name.split("::")
        if name in WAITS:
            self.step.waits.append(name)
        out = func(*args, **(kwargs or {}))
        if namespace == "prim":  # questions about a tensor
            return out
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
        if any(tensor.device != self.device for tensor in tensors):
            # Masks and random features are made on the host and uploaded once.
            self.step.off_device.append(name)
            if all(tensor.device != self.device for tensor in tensors):
                return out
        operator = read_operator(func, args, kwargs, out, self.phase)
        if operator is not None:
            self.step.operators[operator] += 1
            if any(tensor.dtype == torch.float32 and tensor.numel() > 1e6 for tensor in tensors):
                self.step.large_fp32[name] += 1
        return out


def _make_fake(model: nn.Module, device: str, dtype: torch.dtype) -> None:
    """Put a fake tensor in the place of every parameter and buffer."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=device), parameter.requires_grad)
                module._parameters[name] = fake
        for name, buffer in module._buffers.items():
            if buffer is not None:
                kind = dtype if buffer.is_floating_point() else buffer.dtype
                module._buffers[name] = torch.empty(buffer.shape, dtype=kind, device=device)


def _fault(parameter: nn.Parameter) -> str:
    gradient = parameter.grad
    if not parameter.requires_grad:
        return ""
    if gradient is None:
        return "no gradient"
    if gradient.dtype != parameter.dtype or gradient.device != parameter.device:
        return f"{gradient.dtype} on {gradient.device}"
    return "" if gradient.is_contiguous() else "not contiguous"
