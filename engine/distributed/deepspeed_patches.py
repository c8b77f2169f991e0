"""This module is the fence round DeepSpeed: it alone replaces parts of it and calls parts that are not public.

Nothing else imports deepspeed or names its attributes. The pieces were read from version 0.19.8. Each says what it
replaces, why, what upstream says of it, and the test that tells when it can go; tests without a path stand in
tests/engine/distributed/test_deepspeed_patches.py. For every stage, tests/engine/distributed/test_zero.py holds the
values.

Under a version that the tests have not seen, optional pieces are left out: gradients go through DeepSpeed's own
buckets, its own overflow check runs, and the log says so. One piece is needed, the fp32 state of each parameter. It is
checked when an engine is built (`require_state`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from mirl.engine.distributed.environment import DEEPSPEED_INSTALL
from mirl.engine.distributed.flat_gradients import FlatGradients, FlatGroup
from mirl.engine.distributed.muon import Matrix, MuonAdamW, Share
from mirl.engine.distributed.one_pass import OnePassAdamW, OwnedGroup
from mirl.errors import UserError

TESTED_VERSIONS = ("0.19.8",)
MOMENTS = ("exp_avg", "exp_avg_sq")


def prepare_environment() -> None:
    """Spare DeepSpeed a search for accelerators and for ninja; to be called before it is imported.

    Replaces nothing. Without DS_ACCELERATOR, and on a machine without a GPU, DeepSpeed warns that it found none. It
    looks for ninja on PATH, which has the ninja of this environment only if the environment is activated. Upstream: its
    documents name the variable; nothing has to go.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if shutil.which("ninja") is None:
        os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])


prepare_environment()

import deepspeed  # noqa: E402
import deepspeed.ops  # noqa: E402
from pydantic import ValidationError  # noqa: E402 - DeepSpeed checks its sections with it

VERSION: str = deepspeed.__version__


def is_tested() -> bool:
    """Say whether the tests have run with the installed version."""
    return VERSION in TESTED_VERSIONS


def remark_on_version() -> list[str]:
    """Return one line for the log if the tests have not seen the installed version, else none."""
    if is_tested():
        return []
    return [
        f"deepspeed {VERSION} is not a version that this engine was tested with ({', '.join(TESTED_VERSIONS)}): "
        f"gradients go through its own buckets, which is slower; {DEEPSPEED_INSTALL} brings one that was"
    ]


def version_error(problem: str) -> UserError:
    """Make the error for an installed version that lacks a part which this engine needs."""
    tested = ", ".join(TESTED_VERSIONS)
    return UserError(f"deepspeed is {VERSION}, {problem}: this engine was tested with {tested}; {DEEPSPEED_INSTALL}")


def import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon optimiser while torch.compile does nothing.

    DeepSpeed imports it to ask whether our optimiser is a Muon. The import compiles three functions, which loads all of
    torch's compiler: half of the time that a small run takes to start. Nobody here uses DeepSpeed's Muon. Upstream: the
    module came with pull request 7509; no issue on its import time was found. It can go when
    test_muon_still_compiles_as_it_is_imported fails.
    """
    compile_, torch.compile = torch.compile, lambda function: function
    try:
        with contextlib.suppress(ImportError):  # only time is lost if another version keeps it elsewhere
            import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        torch.compile = compile_


if is_tested():
    import_muon_uncompiled()

try:
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.utils import (
        safe_get_local_fp32_param,
        safe_get_local_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )
except ImportError as error:
    raise version_error(f"from which an import fails ({error})") from error


def without_shared_memory_collectives() -> None:
    """Tell DeepSpeed that its shared-memory collectives cannot be built.

    They would be compiled on the first use on a CPU, for most of a minute, and serve inference only. No value depends
    on them, so every version that has the table is told. Upstream: they came with pull request 5391. It can go when
    test_shared_memory_collectives_are_still_built_for_training fails.
    """
    getattr(deepspeed.ops, "__compatible_ops__", {})["deepspeed_shm_comm"] = False


def forget_process_group_of_earlier_run() -> None:
    """Let DeepSpeed look up the process group anew.

    DeepSpeed keeps the first group that it meets until its own function ends it, but a run begins and ends its group by
    torch's functions. A second run in one process, as in a notebook, would be refused with "Group is not registered".
    Upstream: no issue was found. It can go when test_the_process_group_of_an_earlier_run_is_still_kept fails;
    tests/test_docs.py has two runs in one process.
    """
    if is_tested():
        import deepspeed.comm.comm
        import deepspeed.utils.groups

        deepspeed.comm.comm.cdb = None
        deepspeed.utils.groups._WORLD_GROUP = None


def gradient_types(ds_config: dict[str, Any], flat_gradients: bool) -> dict[str, Any]:
    """Return ``ds_config`` without grad_accum_dtype if stage 1 gets flat gradients.

    If grad_accum_dtype is float32, DeepSpeed builds BF16_Optimizer for stage 1 in bf16, which has no partition for flat
    gradients. Flat gradients of several micro-batches are float32 without this key. Upstream: pull requests 2706 and
    2742 chose so. It can go when test_float32_accumulation_in_stage_1_still_builds_another_optimizer fails.
    """
    zero = ds_config["zero_optimization"]
    if not flat_gradients or zero["stage"] != 1 or "offload_optimizer" in zero:
        return ds_config
    types = {key: value for key, value in ds_config.get("data_types", {}).items() if key != "grad_accum_dtype"}
    return ds_config | {"data_types": types}


def look_for_nonfinite_gradients(optimizer: Any) -> None:
    """Make every precision skip a step with a non-finite gradient, and look for one once a step.

    DeepSpeed looks by default in fp16, and in bf16 since pull request 8035. ZeRO 1 and 2 look twice: at every parameter
    (`check_overflow`), and at the norm of all parameters. Every step computes this norm, and it is not finite if any
    gradient is not. The first look, one reduction a parameter, is replaced by nothing. Offloading and ZeRO 3 look in
    passing and keep their own way. Upstream: no issue on the second look was found. It can go when
    test_zero_1_and_2_still_look_twice_for_gradients_that_are_not_finite fails.
    """
    optimizer.check_grad_overflow = True
    if is_tested() and isinstance(optimizer, DeepSpeedZeroOptimizer) and not optimizer.cpu_offload:
        optimizer.check_overflow = lambda partition_gradients=True: None


def forget_gradients_of_skipped_step(optimizer: Any) -> None:
    """Drop the averaged gradients of a step that was skipped.

    With optimiser offload, and gradients added up in float32 beside bf16 weights, DeepSpeed keeps the gradients of a
    skipped step, and the next step adds its own to the NaN. Upstream: issue 8415 was about the same branch, which said
    nothing when it skipped; no issue on the gradients left behind was found. This function runs under every version,
    since an entry that is None already stays None. It can go when
    test_a_skipped_step_with_offload_still_leaves_its_gradients fails.
    """
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = None


def takes_flat_gradients(optimizer: Any) -> bool:
    """Say whether ``optimizer`` is of ZeRO 1 or 2 and `take_gradients` knows how to replace its gradient path."""
    return is_tested() and type(optimizer) is DeepSpeedZeroOptimizer and not optimizer.cpu_offload


def spare_walks_over_parameters(optimizer: Any) -> bool:
    """Drop three walks over all parameters that DeepSpeed makes in each step of ZeRO 1 and 2; say whether it was done.

    The first walk points each parameter at its place in the flat weights, where it already lies and stays. The other
    two forget gradients that `FlatGradients.collector` has taken. For the 836 parameters of ViT-B-48 the walks took 7.5
    of 9.2 ms of a step's Python (benchmarks/LOG.md), in which a GPU that has done its optimiser step stands idle. This
    function checks once that every parameter lies at its place; otherwise nothing is dropped. Upstream: its own comment
    at the first walk doubts that it is needed; no issue was found. It can go when
    test_a_step_still_walks_over_all_parameters fails.
    """
    for flat, group, indices, offsets in zip(
        optimizer.bit16_groups_flat,
        optimizer.bit16_groups,
        optimizer.round_robin_bit16_indices,
        optimizer.round_robin_bit16_offsets,
        strict=True,
    ):
        start, size = flat.data_ptr(), flat.element_size()
        for parameter, index in zip(group, indices, strict=True):
            if parameter.data_ptr() != start + size * offsets[index] or not parameter.is_contiguous():
                return False
    optimizer._update_model_bit16_weights = lambda group_index: None
    optimizer.free_grad_in_param_list = lambda param_list: None
    optimizer.zero_grad = lambda set_to_none=True: None
    return True


class FlatPartition(list):
    """The list holds one group's flat gradient of this rank, in the form that `DeepSpeedZeroOptimizer.step` takes."""

    def __init__(self, flat: torch.Tensor) -> None:
        super().__init__([flat])
        self.flat_partition = flat


def flat_groups(optimizer: Any) -> list[FlatGroup]:
    """Return the layout of a ZeRO-1 or -2 optimiser's flat weights."""
    return [
        FlatGroup(weights, part, {parameter: offsets[index] for parameter, index in zip(group, indices, strict=True)})
        for weights, part, group, indices, offsets in zip(
            optimizer.bit16_groups_flat,
            optimizer.partition_size,
            optimizer.bit16_groups,
            optimizer.round_robin_bit16_indices,
            optimizer.round_robin_bit16_offsets,
            strict=True,
        )
    ]


def take_gradients(
    optimizer: Any, parameters: Iterable[tuple[str, nn.Parameter]], *, accumulation: int
) -> FlatGradients:
    """Let `FlatGradients` receive the gradients of ZeRO 1 and 2 in place of DeepSpeed's own hooks.

    `collector` replaces the hooks on parameters. DeepSpeed's two ways to end a backward pass do nothing. `finish`
    replaces the method that DeepSpeed calls after either of them, and its gradients become the averaged ones. `norm`
    replaces the norm over all groups and ranks.

    DeepSpeed's path runs Python for every parameter and reduces in many small pieces, which costs small models a large
    part of a step; benchmarks/LOG.md has the times. Upstream: pull request 7886 took one such cost out; no issue on the
    path as a whole was found. It can go when a run with --no-flat-gradients is as fast.
    test_what_flat_gradients_replace_is_there_and_called holds the names, test_flat_gradients.py the values.

    ``parameters``: named, in the order of the model. ``accumulation``: micro-batches of a step.
    """
    flat = FlatGradients(
        flat_groups(optimizer),
        parameters,
        process_group=optimizer.dp_process_group,
        bucket=optimizer.reduce_bucket_size,
        accumulation=accumulation,
        is_last_pass=optimizer.is_gradient_accumulation_boundary,
    )

    def end_backward(*args: Any, **kwargs: Any) -> None:
        for number, gradient in enumerate(flat.finish()):
            optimizer.averaged_gradients[number] = FlatPartition(gradient)

    def global_norm(norm_type: int = 2) -> torch.Tensor:
        # DeepSpeed asks once, and once more for each group, whether the norm is finite: so it is fetched to the host.
        # This is the one place where a step waits for the device.
        return flat.norm(partition.flat_partition for partition in optimizer.averaged_gradients.values()).cpu()

    for hook in optimizer._grad_acc_hooks:
        hook.remove()
    optimizer._grad_acc_hooks = [
        parameter.register_post_accumulate_grad_hook(flat.collector(parameter)) for parameter in flat.parameters
    ]
    optimizer.overlapping_partition_gradients_reduce_epilogue = lambda: None
    optimizer.reduce_gradients = lambda pipeline_parallel=False: None
    optimizer.backward_epilogue = end_backward
    optimizer.scaled_global_norm = global_norm
    return flat


def lay_out_matrices(optimizer: Any, muon: MuonAdamW) -> None:
    """Tell ``muon`` which matrices lie in its groups, because ZeRO 1 or 2 gives it flat shares.

    Replaces nothing. DeepSpeed has a Muon of its own since pull request 7509, but it needs DeepSpeed's gradient path.
    test_muon.py holds the values.
    """
    rank = torch.distributed.get_rank(optimizer.dp_process_group)
    layouts = zip(flat_groups(optimizer), optimizer.single_partition_of_fp32_groups, muon.param_groups, strict=True)
    for layout, flat, group in layouts:
        if group.get("muon"):
            share = Share(rank * layout.part, (rank + 1) * layout.part, rank, optimizer.dp_process_group)
            places = sorted(layout.offsets.items(), key=lambda item: item[1])
            muon.lay_out(flat, share, [Matrix(*parameter.shape, offset) for parameter, offset in places])


def can_step_in_one_pass(optimizer: Any) -> bool:
    """Say whether `step_in_one_pass` can take the step of ``optimizer``, which has flat gradients and its moments.

    It can step torch's AdamW with fp32 state, in the plain form that every run has.
    """
    inner = optimizer.optimizer
    plain = all(not group["amsgrad"] and not group["maximize"] for group in inner.param_groups)
    wide = all(flat.dtype == torch.float32 for flat in optimizer.single_partition_of_fp32_groups)
    return (
        type(inner) is torch.optim.AdamW
        and plain
        and wide
        and optimizer.loss_scale == 1
        and optimizer.compute_grad_norm
    )


def step_in_one_pass(optimizer: Any, flat: FlatGradients) -> OnePassAdamW:
    """Put `OnePassAdamW` in the place of DeepSpeed's step of ZeRO 1 and 2; `step_as_before` takes it out again.

    It replaces `step`, which makes a float32 copy of the gradients, clips it, lets torch step, and copies the weights
    to the compute dtype: four passes, and a wait for the norm between the first and the second. Buffers, counters and
    the values that DeepSpeed's engine reads afterwards (`overflow`, `_global_grad_norm`) are as its own step leaves
    them. Upstream: no issue was looked for. It can go when test_a_step_still_takes_several_passes_over_the_state fails,
    which holds the names too; test_one_pass.py holds the values.

    ``flat``: what `take_gradients` returned for ``optimizer``.
    """
    from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID

    rank = torch.distributed.get_rank(optimizer.dp_process_group)
    groups = []
    for number, settings in enumerate(optimizer.optimizer.param_groups):
        master = optimizer.single_partition_of_fp32_groups[number]
        state = optimizer.optimizer.state[master]
        groups.append(OwnedGroup(
            master=master.detach(), exp_avg=state["exp_avg"], exp_avg_sq=state["exp_avg_sq"], taken=state["step"],
            weight=optimizer.parallel_partitioned_bit16_groups[number][rank], settings=settings,
        ))  # fmt: skip
    one_pass = OnePassAdamW(
        groups, norm=flat.norm, ranks=torch.distributed.get_world_size(optimizer.dp_process_group),
        clip=optimizer.clip_grad,
    )  # fmt: skip

    def step(closure: Any = None) -> None:
        optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
        sums = [optimizer.averaged_gradients[number].flat_partition for number in range(len(groups))]
        norm = one_pass.step(sums, lambda: _gather_weights(optimizer))
        optimizer.overflow = not bool(norm.isfinite())
        optimizer._global_grad_norm = float("inf") if optimizer.overflow else norm
        for number in optimizer.averaged_gradients:
            optimizer.averaged_gradients[number] = None

    flat.leaves_sums = True
    optimizer.step = step
    return one_pass


def step_as_before(optimizer: Any, flat: FlatGradients) -> None:
    """Undo `step_in_one_pass`."""
    flat.leaves_sums = False
    vars(optimizer).pop("step", None)


def _gather_weights(optimizer: Any) -> None:
    """Bring every rank's compute weights to all ranks, as the step of ZeRO 1 and 2 does."""
    from deepspeed.runtime.utils import all_gather_dp_groups

    all_gather_dp_groups(
        groups_flat=optimizer.bit16_groups_flat,
        partitioned_param_groups=optimizer.parallel_partitioned_bit16_groups,
        dp_process_group=optimizer.real_dp_process_group,
        start_alignment_factor=optimizer.nccl_start_alignment_factor,
        allgather_bucket_size=optimizer.allgather_bucket_size,
    )


@contextlib.contextmanager
def quiet_about_untested_optimizers() -> Iterator[None]:
    """Leave out DeepSpeed's warning of an optimiser that it does not know; ours is tested under the stages it takes."""
    logger = logging.getLogger("DeepSpeed")

    def known(record: logging.LogRecord) -> bool:
        return "untested optimizer" not in record.getMessage()

    logger.addFilter(known)
    try:
        yield
    finally:
        logger.removeFilter(known)


def initialize(model: nn.Module, optimizer: torch.optim.Optimizer, ds_config: dict[str, Any]) -> tuple[Any, Any]:
    """Make DeepSpeed's engine and its optimiser.

    Raises:
        UserError: DeepSpeed refuses a value of ``ds_config``.
    """
    try:
        engine, zero_optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=ds_config, dist_init_required=False
        )
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(
            f"deepspeed_config has a value that DeepSpeed refuses in {error.title}: {place} is {first['input']!r}: "
            f"{first['msg']}"
        ) from error
    return engine, zero_optimizer


# --- the fp32 state of parameters, without which there are no checkpoints


def require_state(optimizer: Any, stage: int, parameters: Iterable[nn.Parameter]) -> None:
    """Make sure that the functions below will find the fp32 state of the trainable ``parameters``.

    It is called once DeepSpeed has wrapped the model, whatever its version.

    Raises:
        UserError: the installed version keeps the state elsewhere.
    """
    needed: list[tuple[Any, tuple[str, ...]]] = [(optimizer, ("optimizer", "param_groups", "overflow"))]
    if stage == 3:
        needed.append((optimizer, ("fp32_partitioned_groups_flat",)))
        needed += [(parameter, ("ds_tensor", "ds_numel", "ds_process_group")) for parameter in parameters]
    else:
        needed.append((optimizer, ("_lazy_init_hp_params_optimizer_state",)))
        for parameter in parameters:
            needed.append((parameter, ("_hp_mapping",)))
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is not None:
                needed.append((mapping, ("hp_fragment", "lp_fragment_address", "optim_fragment")))
    for thing, names in needed:
        for name in names:
            if not hasattr(thing, name):
                raise version_error(f"whose {type(thing).__name__} has no {name}")


def make_moments(optimizer: Any, stage: int) -> None:
    """Make the state that AdamW, or Muon, would make at its first step.

    It is made before the first step so that fragments can be loaded into it. Also, ZeRO 1 and 2 link parameters to
    their moments only once, during the step of the first group, when the moments of other groups would not exist yet.
    Upstream: pull request 5104 moved the linking into the step; no issue on the other groups was found. It can go when
    test_moments_of_all_but_the_first_group_are_still_not_linked fails and fragments can be loaded before a step.
    """
    if stage == 3:
        flats = optimizer.fp32_partitioned_groups_flat
    else:  # DeepSpeed's optimisers of ZeRO 1, of ZeRO 1 in bf16, and of ZeRO 2 all have one flat tensor a group
        flats = [flat for group in optimizer.optimizer.param_groups for flat in group["params"]]
    alone = {flat for group in optimizer.optimizer.param_groups if group.get("muon") for flat in group["params"]}
    for flat in flats:
        kinds = MOMENTS[:1] if flat in alone else MOMENTS
        moments = {kind: torch.zeros_like(flat, requires_grad=False) for kind in kinds}
        optimizer.optimizer.state[flat] = {"step": torch.zeros((), device=flat.device)} | moments
    if stage != 3:
        optimizer._lazy_init_hp_params_optimizer_state()


def set_steps(optimizer: Any, steps: int) -> None:
    """Set how many steps AdamW believes to have taken, in the counters that `make_moments` has made."""
    for state in optimizer.optimizer.state.values():
        state["step"].fill_(steps)


def mapped_state(parameter: Any, moments: tuple[str, ...] = MOMENTS) -> tuple[int, dict[str, torch.Tensor]]:
    """Return ``(start, {kind: flat view})`` of this rank's part of a ZeRO-1 or -2 parameter; no views without a part.

    ``moments``: the moments that its optimiser keeps.

    The views are live, for checkpoints and for loading; DeepSpeed's public `safe_get_full_*` functions gather whole
    parameters on every rank. Upstream: no public way to the views was found.
    test_state_of_zero_1_and_2_is_live_and_complete holds what is read.
    """
    mapping = parameter._hp_mapping
    if mapping is None:
        return 0, {}
    kept = {kind: mapping.optim_fragment[kind] for kind in moments}
    return mapping.lp_fragment_address.start, {"weight": mapping.hp_fragment.detach()} | kept


def partition_of(parameter: Any) -> tuple[int, int]:
    """Return ``(start, numel)`` of this rank's part of a ZeRO-3 parameter; the last part is padded beyond ``numel``.

    test_state_of_zero_3_is_complete holds what is read here and in the functions below, which are public.
    """
    size = padded_size(parameter)
    start = torch.distributed.get_rank(group=parameter.ds_process_group) * size
    return start, max(0, min(size, parameter.ds_numel - start))


def padded_size(parameter: Any) -> int:
    """Count the elements of every rank's part of a ZeRO-3 parameter, with the padding of the last."""
    return parameter.ds_tensor.numel()


def get_partition(parameter: nn.Parameter, kind: str) -> torch.Tensor:
    """Return this rank's part of a ZeRO-3 parameter's weight or moment, padded."""
    if kind == "weight":
        return safe_get_local_fp32_param(parameter)
    return safe_get_local_optimizer_state(parameter, kind)


def set_partition(parameter: nn.Parameter, kind: str, value: torch.Tensor) -> None:
    """Set the values that `get_partition` returns."""
    if kind == "weight":
        safe_set_local_fp32_param(parameter, value)
    else:
        safe_set_local_optimizer_state(parameter, value, kind)
