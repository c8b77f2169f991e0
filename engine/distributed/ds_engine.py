"""DeepSpeed behind a small face: one engine, its step, and its state as fragments. The only module that imports
deepspeed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

if not torch.cuda.is_available():
    # Without this DeepSpeed looks for an accelerator of its own and warns that it found none.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
if shutil.which("ninja") is None:
    # DeepSpeed probes its extensions with ninja; the one in this environment is found also when the environment is not
    # activated.
    os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])

import deepspeed  # noqa: E402
import deepspeed.ops  # noqa: E402

_compile, torch.compile = torch.compile, lambda function: function
try:
    # DeepSpeed imports its Muon optimiser to ask whether ours is one. Compiling three functions of it on import would
    # load all of torch's compiler: half of the time that a small run takes to start. We have no use for Muon.
    with contextlib.suppress(ImportError):  # only time is lost where another version keeps it elsewhere
        import deepspeed.runtime.zero.muon.original_muon  # noqa: E402
finally:
    torch.compile = _compile

from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer  # noqa: E402
from deepspeed.utils import (  # noqa: E402
    logger as deepspeed_logger,
)
from deepspeed.utils import (  # noqa: E402
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

from mirl.engine.distributed.flat_gradients import FlatGradients  # noqa: E402

DEEPSPEED_VERSION: str = deepspeed.__version__
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("weight", *MOMENTS)


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """A run of consecutive elements of one parameter's fp32 state, owned by this rank.

    ``kind`` is "weight", "exp_avg" or "exp_avg_sq"; ``start`` counts elements of the flattened parameter.
    """

    name: str
    kind: str
    start: int
    tensor: torch.Tensor

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.name}@{self.start}"


# name, kind, first element, number of elements -> flat fp32 tensor
FragmentReader = Callable[[str, str, int, int], torch.Tensor]


class TrainEngine:
    """A model under ZeRO 1, 2 or 3 with a torch optimiser.

    ``flat_gradients``: see `mirl.engine.distributed.flat_gradients`; without it gradients go through DeepSpeed's
    buckets.

    The fp32 state (weights and both moments) is read and written as `Fragment` s: pieces of named parameters, whatever
    the stage and the number of ranks, so that a checkpoint of one layout loads into any other.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        ds_config: dict[str, Any],
        *,
        flat_gradients: bool = True,
    ) -> None:
        deepspeed_logger.setLevel(logging.WARNING)
        # The shared-memory collectives of DeepSpeed would be compiled on first use, for most of a minute; gloo does as
        # well here.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.stage: int = ds_config["zero_optimization"]["stage"]
        if flat_gradients and self.stage == 1 and "offload_optimizer" not in ds_config["zero_optimization"]:
            # With float32 here DeepSpeed takes an optimiser of its own kind for stage 1 in bf16. Where several
            # micro-batches add up, the flat gradients are float32 whatever stands here.
            types = {key: value for key, value in ds_config.get("data_types", {}).items() if key != "grad_accum_dtype"}
            ds_config = ds_config | {"data_types": types}
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=ds_config, dist_init_required=False
        )
        # DeepSpeed looks for non-finite gradients by default in bf16 only.
        self._optimizer.check_grad_overflow = True
        self._look_once_for_nonfinite_gradients()
        # Stage 3 and offloading keep gradients elsewhere, and DeepSpeed's own ways.
        if flat_gradients and type(self._optimizer) is DeepSpeedZeroOptimizer and not self._optimizer.cpu_offload:
            FlatGradients(
                self._optimizer,
                model.named_parameters(),
                bucket=self._optimizer.reduce_bucket_size,
                accumulation=self._engine.gradient_accumulation_steps(),
            )
        self._make_moments()
        self.remarks: list[str] = []

    @property
    def module(self) -> nn.Module:
        return self._engine.module

    @property
    def weight_dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss)

    def step(self, lr: float) -> bool | None:
        """Apply the step at learning rate ``lr``, times "lr_scale" of a parameter group that has one, once all
        micro-batches are in.

        Returns None inside an accumulation, True after an applied step, False after one that was skipped on every rank
        because a gradient was not finite.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        boundary = self._engine.is_gradient_accumulation_boundary()
        self._engine.step()
        if not boundary:
            return None
        if self._optimizer.overflow and isinstance(self._optimizer, DeepSpeedZeroOptimizer):
            # DeepSpeed 0.19.8 forgets these where it offloads in bf16, and adds the next step's gradients to the NaN.
            for group in self._optimizer.averaged_gradients:
                self._optimizer.averaged_gradients[group] = None
        return not self._optimizer.overflow

    def gradient_norm(self) -> float:
        """Global gradient norm of the last step before clipping; synchronises with the device."""
        norm = self._engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    # --- state as fragments

    def fragments(self) -> Iterator[Fragment]:
        """The fp32 state owned by this rank: live tensors, to be copied before the next step."""
        for name, parameter in self._trainable():
            if self.stage == 3:
                start, numel = self._partition(parameter)
                pieces = {kind: self._get_partition(parameter, kind)[:numel] for kind in KINDS} if numel else {}
            else:
                start, pieces = self._mapped(parameter)
            for kind, tensor in pieces.items():
                yield Fragment(name=name, kind=kind, start=start, tensor=tensor)

    @torch.no_grad()
    def load_fragments(self, read: FragmentReader, *, optimizer_steps: int) -> None:
        """Set the fp32 weights of this rank's part from ``read``, and its moments if ``optimizer_steps`` is not 0.

        The compute weights are not touched: load them into the model before it is given to this engine.
        """
        kinds = KINDS if optimizer_steps else KINDS[:1]
        for state in self._optimizer.optimizer.state.values():
            state["step"].fill_(optimizer_steps)
        for name, parameter in self._trainable():
            if self.stage == 3:
                start, numel = self._partition(parameter)
                for kind in kinds if numel else ():
                    padded = torch.zeros(parameter.ds_tensor.numel(), dtype=torch.float32)
                    padded[:numel] = read(name, kind, start, numel)
                    self._set_partition(parameter, kind, padded)
            else:
                start, pieces = self._mapped(parameter)
                for kind in kinds if pieces else ():
                    pieces[kind].copy_(read(name, kind, start, pieces[kind].numel()))

    def _trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, parameter) for name, parameter in self.module.named_parameters() if parameter.requires_grad)

    def _look_once_for_nonfinite_gradients(self) -> None:
        """Leave it to the norm of the gradients, which every step computes.

        A NaN or an infinity in any gradient of any rank makes the norm one too, and ZeRO 1 and 2 skip the step for it
        as well, so that their other look, one reduction a parameter, finds nothing new. Offloading and ZeRO 3 look in
        passing.
        """
        if isinstance(self._optimizer, DeepSpeedZeroOptimizer) and not self._optimizer.cpu_offload:
            self._optimizer.check_overflow = lambda partition_gradients=True: None

    def _make_moments(self) -> None:
        """The state that AdamW would make at its first step.

        Made now, so that there is something to load into, and because ZeRO 1 and 2 link parameters to their moments
        only once, during the step of the first group, when those of the other groups would not exist yet (DeepSpeed
        0.19.8).
        """
        if self.stage == 3:
            flats = self._optimizer.fp32_partitioned_groups_flat
        else:  # one flat tensor a group, in DeepSpeed's optimisers of ZeRO 1, of ZeRO 1 in bf16, and of ZeRO 2 alike
            flats = [flat for group in self._optimizer.optimizer.param_groups for flat in group["params"]]
        for flat in flats:
            moments = {kind: torch.zeros_like(flat, requires_grad=False) for kind in MOMENTS}
            self._optimizer.optimizer.state[flat] = {"step": torch.zeros((), device=flat.device)} | moments
        if self.stage != 3:
            self._optimizer._lazy_init_hp_params_optimizer_state()

    @staticmethod
    def _mapped(parameter: nn.Parameter) -> tuple[int, dict[str, torch.Tensor]]:
        """``(start, {kind: flat view})`` of this rank's part of a ZeRO-1 or -2 parameter; empty where it has none."""
        mapping = parameter._hp_mapping
        if mapping is None:
            return 0, {}
        moments = {kind: mapping.optim_fragment[kind] for kind in MOMENTS}
        return mapping.lp_fragment_address.start, {"weight": mapping.hp_fragment.detach()} | moments

    @staticmethod
    def _partition(parameter: nn.Parameter) -> tuple[int, int]:
        """``(start, numel)`` of this rank's part of a ZeRO-3 parameter; the last part is padded beyond ``numel``."""
        size = parameter.ds_tensor.numel()
        start = torch.distributed.get_rank(group=parameter.ds_process_group) * size
        return start, max(0, min(size, parameter.ds_numel - start))

    @staticmethod
    def _get_partition(parameter: nn.Parameter, kind: str) -> torch.Tensor:
        return (
            safe_get_local_fp32_param(parameter)
            if kind == "weight"
            else safe_get_local_optimizer_state(parameter, kind)
        )

    @staticmethod
    def _set_partition(parameter: nn.Parameter, kind: str, value: torch.Tensor) -> None:
        if kind == "weight":
            safe_set_local_fp32_param(parameter, value)
        else:
            safe_set_local_optimizer_state(parameter, value, kind)
