"""The fence round DeepSpeed: what we replace inside it, and what we call that is not its public face.

Nothing else imports deepspeed. Each piece says what it replaces, why, what upstream says of it, and the test in
tests/engine/distributed/test_deepspeed_patches.py that tells when it can go. They were read from version 0.19.8.

Under a version that the tests have not seen, whatever is not needed is left alone: gradients go through DeepSpeed's own
buckets, its own overflow check runs, and the log says so. What is needed, the fp32 state of each parameter, is checked
when an engine is built (`require_state`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from mirl.errors import UserError

TESTED_VERSIONS = ("0.19.8",)
INSTALL_LINE = "pip install 'deepspeed>=0.19.8,<0.20'"
MOMENTS = ("exp_avg", "exp_avg_sq")


def prepare_environment() -> None:
    """Spare DeepSpeed a search for accelerators and for ninja; to be called before it is imported.

    Replaces nothing. Without DS_ACCELERATOR it warns on a machine without a GPU that it found none. It looks for ninja
    on PATH, where the one of this environment is only if the environment is activated.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if shutil.which("ninja") is None:
        os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])


prepare_environment()

import deepspeed  # noqa: E402
import deepspeed.comm.comm  # noqa: E402
import deepspeed.ops  # noqa: E402
import deepspeed.utils.groups  # noqa: E402

VERSION: str = deepspeed.__version__


def is_tested() -> bool:
    """Whether the tests have run with the installed version."""
    return VERSION in TESTED_VERSIONS


def remark_on_version() -> list[str]:
    """One line for the log where the tests have not seen the installed version, none otherwise."""
    if is_tested():
        return []
    return [
        f"deepspeed {VERSION} is not a version that this engine was tested with ({', '.join(TESTED_VERSIONS)}): "
        f"gradients go through its own buckets, which is slower; {INSTALL_LINE} brings one that was"
    ]


def import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon optimiser while torch.compile does nothing.

    DeepSpeed imports it to ask whether our optimiser is one. The module compiles three functions as it is imported, and
    that loads all of torch's compiler: half of the time that a small run takes to start. Nobody here uses Muon of
    DeepSpeed. Upstream: the module came with pull request 7509; no issue on its import time was found.
    """
    compile_, torch.compile = torch.compile, lambda function: function
    try:
        with contextlib.suppress(ImportError):  # only time is lost where another version keeps it elsewhere
            import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        torch.compile = compile_


if is_tested():
    import_muon_uncompiled()

from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer  # noqa: E402
from deepspeed.utils import (  # noqa: E402
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)


def without_shared_memory_collectives() -> None:
    """Tell DeepSpeed that its shared-memory collectives cannot be built.

    They would be compiled on the first use on a CPU, for most of a minute, and serve inference only. gloo does as well
    here. Upstream: they came with pull request 5391.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def forget_process_group_of_earlier_run() -> None:
    """Let DeepSpeed look up the process group anew.

    It keeps the first one that it meets for the life of the process. A second run in one process, as in a notebook, has
    a group of its own, and would be refused with "Group is not registered". Upstream: no issue was found.
    """
    deepspeed.comm.comm.cdb = None
    deepspeed.utils.groups._WORLD_GROUP = None


def gradient_types(ds_config: dict[str, Any], flat_gradients: bool) -> dict[str, Any]:
    """``ds_config`` without grad_accum_dtype where stage 1 gets flat gradients.

    With float32 there DeepSpeed builds BF16_Optimizer for stage 1 in bf16, which has no partition that gradients could
    go to. Where several micro-batches add up, flat gradients are float32 whatever stands here.
    """
    zero = ds_config["zero_optimization"]
    if not flat_gradients or zero["stage"] != 1 or "offload_optimizer" in zero:
        return ds_config
    types = {key: value for key, value in ds_config.get("data_types", {}).items() if key != "grad_accum_dtype"}
    return ds_config | {"data_types": types}


def look_for_nonfinite_gradients(optimizer: Any) -> None:
    """Make every precision skip a step with a non-finite gradient, and look for one once a step.

    DeepSpeed looks by default in fp16, and in bf16 since pull request 8035. ZeRO 1 and 2 look twice: at every parameter
    (`check_overflow`), and at the norm of all of them, which every step computes and which is not finite if any
    gradient is not. The first look, one reduction a parameter, is replaced by nothing. Offloading and ZeRO 3 look in
    passing and keep their own way.
    """
    optimizer.check_grad_overflow = True
    if is_tested() and isinstance(optimizer, DeepSpeedZeroOptimizer) and not optimizer.cpu_offload:
        optimizer.check_overflow = lambda partition_gradients=True: None


def forget_gradients_of_skipped_step(optimizer: Any) -> None:
    """Drop the averaged gradients of a step that was skipped.

    With optimiser offload in bf16 DeepSpeed leaves them, and the next step adds its own to the NaN. Upstream: issue
    8415 is about the same branch, which says nothing when it skips; none on what it leaves behind was found.
    """
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = None


def takes_flat_gradients(optimizer: Any) -> bool:
    """Whether ``optimizer`` is one of ZeRO 1 or 2 whose gradient path `hand_over_gradients` knows how to replace."""
    return is_tested() and type(optimizer) is DeepSpeedZeroOptimizer and not optimizer.cpu_offload


def hand_over_gradients(
    optimizer: Any,
    parameters: Iterable[nn.Parameter],
    *,
    collect: Callable[[nn.Parameter], None],
    finish: Callable[[], None],
    norm: Callable[[], torch.Tensor],
) -> None:
    """Let `FlatGradients` receive the gradients of ZeRO 1 and 2 in place of DeepSpeed's own hooks.

    Replaced: the hooks on parameters by ``collect``; both ways to end a backward pass by nothing, and what DeepSpeed
    calls after either of them by ``finish``; the norm over all groups and ranks by ``norm``. DeepSpeed's path runs
    Python for every parameter and reduces in many small pieces, which costs small models a large part of a step.
    Upstream: issue 3151.
    """
    for hook in optimizer._grad_acc_hooks:
        hook.remove()
    optimizer._grad_acc_hooks = [parameter.register_post_accumulate_grad_hook(collect) for parameter in parameters]
    optimizer.overlapping_partition_gradients_reduce_epilogue = lambda: None
    optimizer.reduce_gradients = lambda pipeline_parallel=False: None
    optimizer.backward_epilogue = lambda *args, **kwargs: finish()
    optimizer.scaled_global_norm = lambda norm_type=2: norm()


# --- the fp32 state of parameters, without which there are no checkpoints


def require_state(optimizer: Any, stage: int, parameters: Iterable[nn.Parameter]) -> None:
    """UserError where the installed version keeps the fp32 state of parameters elsewhere than we know."""
    parameter = next(iter(parameters))
    names = (
        [(optimizer, "fp32_partitioned_groups_flat"), (parameter, "ds_tensor"), (parameter, "ds_numel")]
        if stage == 3
        else [(optimizer, "_lazy_init_hp_params_optimizer_state"), (parameter, "_hp_mapping")]
    )
    for thing, name in [*names, (optimizer, "optimizer")]:
        if not hasattr(thing, name):
            raise UserError(
                f"deepspeed is {VERSION}, whose {type(thing).__name__} has no {name}: this engine was tested with "
                f"{', '.join(TESTED_VERSIONS)}; {INSTALL_LINE}"
            )


def make_moments(optimizer: Any, stage: int) -> None:
    """Make the state that AdamW would make at its first step.

    Made before the first step, so that there is something to load into, and because ZeRO 1 and 2 link parameters to
    their moments only once, during the step of the first group, when those of the other groups would not exist yet.
    Upstream: no issue was found.
    """
    if stage == 3:
        flats = optimizer.fp32_partitioned_groups_flat
    else:  # one flat tensor a group, in DeepSpeed's optimisers of ZeRO 1, of ZeRO 1 in bf16, and of ZeRO 2 alike
        flats = [flat for group in optimizer.optimizer.param_groups for flat in group["params"]]
    for flat in flats:
        moments = {kind: torch.zeros_like(flat, requires_grad=False) for kind in MOMENTS}
        optimizer.optimizer.state[flat] = {"step": torch.zeros((), device=flat.device)} | moments
    if stage != 3:
        optimizer._lazy_init_hp_params_optimizer_state()


def mapped_state(parameter: Any) -> tuple[int, dict[str, torch.Tensor]]:
    """``(start, {kind: flat view})`` of this rank's part of a ZeRO-1 or -2 parameter; empty where it has none.

    DeepSpeed's public `safe_get_local_*` functions copy; these are live views, for checkpoints and for loading.
    """
    mapping = parameter._hp_mapping
    if mapping is None:
        return 0, {}
    moments = {kind: mapping.optim_fragment[kind] for kind in MOMENTS}
    return mapping.lp_fragment_address.start, {"weight": mapping.hp_fragment.detach()} | moments


def partition_of(parameter: Any) -> tuple[int, int]:
    """``(start, numel)`` of this rank's part of a ZeRO-3 parameter; the last part is padded beyond ``numel``."""
    size = padded_size(parameter)
    start = torch.distributed.get_rank(group=parameter.ds_process_group) * size
    return start, max(0, min(size, parameter.ds_numel - start))


def padded_size(parameter: Any) -> int:
    """Elements of every rank's part of a ZeRO-3 parameter, with what pads the last."""
    return parameter.ds_tensor.numel()


def get_partition(parameter: nn.Parameter, kind: str) -> torch.Tensor:
    """This rank's part of a ZeRO-3 parameter's weight or moment, padded."""
    if kind == "weight":
        return safe_get_local_fp32_param(parameter)
    return safe_get_local_optimizer_state(parameter, kind)


def set_partition(parameter: nn.Parameter, kind: str, value: torch.Tensor) -> None:
    """Set what `get_partition` returns."""
    if kind == "weight":
        safe_set_local_fp32_param(parameter, value)
    else:
        safe_set_local_optimizer_state(parameter, value, kind)
