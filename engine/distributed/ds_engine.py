"""DeepSpeed stands behind a small face: one engine, its step, and its state as fragments."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mirl.engine.distributed import deepspeed_patches as patches
from mirl.engine.distributed.flat_gradients import FlatGradients
from mirl.engine.distributed.muon import MuonAdamW
from mirl.engine.distributed.one_pass import OnePassAdamW
from mirl.engine.distributed.spike_gate import SpikeGate
from mirl.errors import UserError

DEEPSPEED_VERSION = patches.VERSION
KINDS = ("weight", *patches.MOMENTS)


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """A fragment is consecutive elements of one parameter's fp32 state, owned by this rank.

    ``kind`` is "weight", "exp_avg" or "exp_avg_sq", which matrices under Muon lack. ``start`` counts elements of the
    flattened parameter.
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
    """The engine trains a model under ZeRO 1, 2 or 3 with a torch optimiser.

    ``flat_gradients``: see `mirl.engine.distributed.flat_gradients`; without it gradients go through DeepSpeed's
    buckets.

    The fp32 state (weights and moments) is read and written as `Fragment` s: pieces of named parameters, whatever the
    stage and the number of ranks. So a checkpoint of any stage and number of ranks loads into any other.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        ds_config: dict[str, Any],
        *,
        flat_gradients: bool = True,
    ) -> None:
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        patches.without_shared_memory_collectives()
        patches.forget_process_group_of_earlier_run()
        self.stage: int = ds_config["zero_optimization"]["stage"]
        self.remarks = patches.remark_on_version()
        flat_gradients = flat_gradients and patches.is_tested()
        self._momentum_alone = {
            parameter for group in optimizer.param_groups if group.get("muon") for parameter in group["params"]
        }
        if isinstance(optimizer, MuonAdamW):
            ds_config = ds_config | {"zero_allow_untested_optimizer": True}  # DeepSpeed knows AdamW, not its subclass
        with patches.quiet_about_untested_optimizers():
            self._engine, self._optimizer = patches.initialize(
                model, optimizer, patches.gradient_types(ds_config, flat_gradients)
            )
        patches.require_state(self._optimizer, self.stage, [parameter for _, parameter in self._trainable()])
        patches.look_for_nonfinite_gradients(self._optimizer)
        self._flat: FlatGradients | None = None
        self._in_flat_weights = False
        self._one_pass: OnePassAdamW | None = None
        self.loaded_steps = 0  # applied steps of the state that was loaded last
        # Stage 3 and offloading keep gradients elsewhere, so they go DeepSpeed's own way.
        if flat_gradients and patches.takes_flat_gradients(self._optimizer):
            self._flat = patches.take_gradients(
                self._optimizer, model.named_parameters(), accumulation=self._engine.gradient_accumulation_steps()
            )
            self._in_flat_weights = patches.spare_walks_over_parameters(self._optimizer)
            if not self._in_flat_weights:
                self.remarks.append("parameters do not lie in the flat weights: each step walks over all of them")
        if isinstance(optimizer, MuonAdamW):
            if self._flat is None:
                raise UserError(
                    f"optimizer is muon, which steps whole matrices and needs flat gradients under ZeRO 1 or 2: this "
                    f"is stage {self.stage}{'' if self.stage == 3 else ' without them'}: give --deepspeed_config "
                    "zero2, without offloading and --no-flat-gradients, or --optimizer adamw"
                )
            patches.lay_out_matrices(self._optimizer, optimizer)
        patches.make_moments(self._optimizer, self.stage)

    @property
    def module(self) -> Any:
        """Return the model that was given, with its own methods."""
        return self._engine.module

    @property
    def weight_dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        if self._flat is not None and self._flat.gate is not None:
            self._flat.gate.add(loss)
        self._engine.backward(loss)

    def step(self, lr: float) -> bool | None:
        """Apply the step at learning rate ``lr`` once all micro-batches are in.

        A parameter group's "lr_scale" multiplies ``lr``. Returns None inside an accumulation, True after an applied
        step, and False after a step that was skipped on every rank, because a gradient was not finite or the gate of
        `watch_steps` was closed.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        boundary = self._engine.is_gradient_accumulation_boundary()
        self._engine.step()
        if not boundary:
            return None
        if self._optimizer.overflow:
            patches.forget_gradients_of_skipped_step(self._optimizer)
        return not self._optimizer.overflow

    @property
    def can_watch_steps(self) -> bool:
        """Say whether this engine offers `watch_steps`: ZeRO 1 or 2 with flat gradients."""
        return self._flat is not None

    def watch_steps(self, *, closes: bool) -> SpikeGate:
        """Bring the loss of each further step to the host beside its gradient norm. ``closes``: see `SpikeGate`."""
        assert self._flat is not None, "the loss travels with the norm of flat gradients"
        parts = self._engine.gradient_accumulation_steps() * torch.distributed.get_world_size()
        self._flat.gate = SpikeGate(micro_batches=parts, closes=closes)
        return self._flat.gate

    # --- the optimiser's step

    @property
    def can_step_in_one_pass(self) -> bool:
        """Say whether this engine offers `step_in_one_pass`: ZeRO 1 or 2 with flat gradients, and AdamW of torch."""
        return self._in_flat_weights and patches.can_step_in_one_pass(self._optimizer)

    @property
    def flat_share(self) -> tuple[int, torch.dtype, bool]:
        """Measure a step in one pass: values of this rank, the dtype of their gradients, whether it clips."""
        assert self._flat is not None, "one pass goes over flat gradients"
        return *self._flat.share, self._optimizer.clip_grad > 0

    @property
    def steps_in_one_pass(self) -> bool:
        return self._one_pass is not None

    def step_in_one_pass(self, on: bool) -> None:
        """Take further steps in one pass over the flat buffers, or as DeepSpeed and torch do; call it between steps.

        The state is the same and stays where it is, so that checkpoints do not differ. See
        `mirl.engine.distributed.one_pass`.
        """
        assert self._flat is not None, "one pass goes over flat gradients"
        if on and self._one_pass is None:
            self._one_pass = patches.step_in_one_pass(self._optimizer, self._flat)
        elif not on and self._one_pass is not None:
            patches.step_as_before(self._optimizer, self._flat)
            self._one_pass = None

    def gradient_norm(self) -> float:
        """Return the global gradient norm of the last step before clipping; this synchronises with the device."""
        if self._flat is not None and self._flat.gate is not None and self._flat.gate.last is not None:
            return self._flat.gate.last.gradient_norm
        norm = self._engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    # --- state as fragments

    def fragments(self) -> Iterator[Fragment]:
        """Yield the fp32 state owned by this rank: live tensors, to be copied before the next step."""
        for name, parameter in self._trainable():
            if self.stage == 3:
                start, numel = patches.partition_of(parameter)
                pieces = {kind: patches.get_partition(parameter, kind)[:numel] for kind in KINDS} if numel else {}
            else:
                start, pieces = self._mapped_state(parameter)
            for kind, tensor in pieces.items():
                yield Fragment(name=name, kind=kind, start=start, tensor=tensor)

    @torch.no_grad()
    def restore(self, read: FragmentReader, *, optimizer_steps: int) -> None:
        """Set weights, moments and compute weights from ``read`` between two steps, under ZeRO 1 or 2 alone."""
        assert self.stage < 3, "compute weights are whole on each rank"
        self.load_fragments(read, optimizer_steps=optimizer_steps, moments=True)
        for name, parameter in self._trainable():
            parameter.copy_(read(name, "weight", 0, parameter.numel()).reshape(parameter.shape))

    @torch.no_grad()
    def load_fragments(self, read: FragmentReader, *, optimizer_steps: int, moments: bool = False) -> None:
        """Set the fp32 weights of this rank's part from ``read``.

        Moments are set if ``optimizer_steps`` is not 0 or ``moments`` asks for them. The compute weights are not
        touched: load them into the model before it is given to this engine.
        """
        kinds = KINDS if optimizer_steps or moments else KINDS[:1]
        self.loaded_steps = optimizer_steps
        patches.set_steps(self._optimizer, optimizer_steps)
        if self._one_pass is not None:
            self._one_pass.forget_count()
        for name, parameter in self._trainable():
            if self.stage == 3:
                start, numel = patches.partition_of(parameter)
                for kind in kinds if numel else ():
                    padded = torch.zeros(patches.padded_size(parameter), dtype=torch.float32)
                    padded[:numel] = read(name, kind, start, numel)
                    patches.set_partition(parameter, kind, padded)
            else:
                start, pieces = self._mapped_state(parameter)
                for kind, piece in pieces.items():
                    if kind in kinds:
                        piece.copy_(read(name, kind, start, piece.numel()))

    def _mapped_state(self, parameter: nn.Parameter) -> tuple[int, dict[str, torch.Tensor]]:
        moments = patches.MOMENTS[:1] if parameter in self._momentum_alone else patches.MOMENTS
        return patches.mapped_state(parameter, moments)

    def _trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, parameter) for name, parameter in self.module.named_parameters() if parameter.requires_grad)
