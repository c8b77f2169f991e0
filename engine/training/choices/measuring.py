"""One use measured: each candidate forward and backward, compared with the reference, then timed against the others."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
import torch._dynamo
from torch import Tensor

from mirl.engine.training.choices.declaration import Choice, Compiled, Implementation, Use

LIMIT_S = 9.0  # nothing is begun later, so that what was begun ends within ten
ROUNDS, FEWEST_ROUNDS = 7, 3
ROUND_S = 1e-3  # at least, so that a clock's resolution and the start of a round do not count
MOST_REPEATS = 8
# Another candidate than the default must be faster by this share, or two that are alike would change places by noise.
MARGIN = 0.02
TOO_SLOW = 3.0  # times the fastest, in the best of two rounds: timed no further
# A run's memory is planned for the default; another candidate may keep so much more for the backward pass.
MOST_KEPT = 1.25
# Shapes that one candidate may be traced for.
MOST_TRACES = 64
HOST_LEAD_CYCLES_PER_S = 2.5e9  # the clock of a fast GPU, so that a slower one waits rather too long


@dataclass
class Deadline:
    """Time for all of a run's measurements. ``clock`` is in seconds."""

    limit_s: float = LIMIT_S
    clock: Callable[[], float] = time.perf_counter
    _begin: float = field(init=False)
    _longest: dict[str, float] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._begin = self.clock()

    @property
    def spent(self) -> float:
        return self.clock() - self._begin

    @property
    def over(self) -> bool:
        return self.spent >= self.limit_s

    def allows(self, label: str) -> bool:
        """Whether what ``label`` names would end in time if it took as long as the longest of that name so far."""
        return self.spent + self._longest.get(label, 0.0) < self.limit_s

    def note(self, label: str, begin: float) -> None:
        """What ``label`` names took from ``begin`` of the clock until now."""
        self._longest[label] = max(self._longest.get(label, 0.0), self.clock() - begin)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What was chosen for a use and why; times in milliseconds, forward and backward, of the candidates that ran.

    excluded: why a candidate was no choice. measured: False where the default stayed for lack of a measurement.
    """

    chosen: str
    default: str
    reason: str
    times_ms: Mapping[str, float] = field(default_factory=dict)
    excluded: Mapping[str, str] = field(default_factory=dict)
    measured: bool = True


def try_out(choice: Choice, use: Use, name: str, device: torch.device) -> str | None:
    """Run candidate ``name`` once, forward and backward, on two images; returns why it cannot be used, else None."""
    small = use.with_batch(2)
    candidates = choice.candidates(small, device)
    if name not in candidates:
        return f"it is no candidate of {choice.name} here ({', '.join(candidates)})"
    leaves = choice.inputs(small, device, torch.Generator(device).manual_seed(0))
    try:
        forward_backward(candidates[name], leaves, None)
    except Exception as error:  # noqa: BLE001 - an extension raises anything; the caller tells it
        return first_line(error)
    return None


def warm_up_compiler(device: torch.device) -> None:
    """Have the compiler load what it needs: compiled regions would do it a moment later, so no choice pays for it."""
    leaf = torch.ones(64, device=device, requires_grad=True)
    with contextlib.suppress(Exception):  # the candidates will say what is missing
        forward_backward(Compiled(lambda x: x.sin()), [leaf], None)


def measure(choice: Choice, use: Use, default: str, device: torch.device, deadline: Deadline) -> Finding:
    """Choose a candidate for ``use``: the fastest of those that give the reference's result and gradients."""
    not_reached = f"not reached: {deadline.limit_s:g} s were over"
    if not deadline.allows(choice.name):
        return Finding(chosen=default, default=default, reason=not_reached, measured=False)
    if use.dtype not in choice.tolerance:
        reason = f"{choice.name} declares no tolerance for {use.dtype}"
        return Finding(chosen=default, default=default, reason=reason, measured=False)
    generator = torch.Generator(device).manual_seed(0)
    with torch._dynamo.config.patch(recompile_limit=MOST_TRACES):
        try:
            begin = deadline.clock()
            leaves = choice.inputs(use, device, generator)
            outputs = _outputs(choice.reference(use)(*leaves))
            cotangents = None
            if any(leaf.requires_grad for leaf in leaves):
                cotangents = [torch.randn(x.shape, device=device, generator=generator).to(x.dtype) for x in outputs]
            del outputs
            expected = forward_backward(choice.reference(use), leaves, cotangents)
            candidates = choice.candidates(use, device)
            deadline.note(choice.name, begin)
        except Exception as error:  # noqa: BLE001 - memory for one
            reason = f"the reference failed: {first_line(error)}"
            return Finding(chosen=default, default=default, reason=reason, measured=False)
        excluded: dict[str, str] = {}
        sound: dict[str, Callable[[], None]] = {}
        allowed: float | None = None
        # The default first: it says how much memory may be kept, and how fast the others must be.
        for name in sorted(candidates, key=lambda name: name != default):
            label = _kind_of_work(choice, use, name, candidates[name])
            if not deadline.allows(label):
                excluded[name] = not_reached
                continue
            begin = deadline.clock()
            problem = _problem(choice, use, candidates[name], leaves, cotangents, expected)
            if problem is None and not isinstance(candidates[name], Compiled):
                kept = kept_bytes(candidates[name], leaves)
                if name == default:
                    allowed = MOST_KEPT * kept
                elif allowed is not None and kept > allowed:
                    problem = (
                        f"it keeps {kept / 1e6:.3g} MB for the backward pass, {default} {allowed / MOST_KEPT / 1e6:.3g}"
                    )
            deadline.note(label, begin)
            if problem is not None:
                excluded[name] = problem
                continue
            sound[name] = _call(candidates[name], leaves, cotangents)
        del expected
        times = _time(sound, device, deadline)
    return _choose(times, excluded, default, not_reached, len(candidates))


def _kind_of_work(choice: Choice, use: Use, name: str, run: Implementation) -> str:
    """What takes about as long as another of the same kind: in a region it is the compiler that takes the time."""
    if not use.in_region:
        return f"{choice.name}: {name}"
    return "compiled" if isinstance(run, Compiled) else "traced"


def _choose(
    times: Mapping[str, float], excluded: Mapping[str, str], default: str, not_reached: str, count: int
) -> Finding:
    """``count``: of all candidates."""
    shown = {name: 1e3 * seconds for name, seconds in times.items()}
    if not times:
        reason = "no candidate runs" if len(excluded) == count else not_reached
        return Finding(chosen=default, default=default, reason=reason, excluded=excluded, measured=False)
    fastest = min(times, key=lambda name: times[name])
    if excluded.get(default) == not_reached:
        return Finding(
            chosen=default, default=default, reason=not_reached, times_ms=shown, excluded=excluded, measured=False
        )
    complete = not_reached not in excluded.values()
    if default in times and times[fastest] > (1 - MARGIN) * times[default]:
        fastest, reason = default, "no other is faster" if complete else "no other that was reached is faster"
    elif default in times:
        reason = f"{times[default] / times[fastest]:.2f} times as fast as {default}"
    else:
        reason = f"{default} cannot be used here"
    return Finding(
        chosen=fastest, default=default, reason=reason, times_ms=shown, excluded=excluded,
        measured=complete,
    )  # fmt: skip


def forward_backward(
    run: Implementation, leaves: Sequence[Tensor], cotangents: Sequence[Tensor] | None
) -> list[Tensor]:
    """Results of ``run`` on ``leaves`` and its gradients; ``cotangents`` None: ones. Results alone where no leaf is one
    to differentiate by.
    """
    with torch.enable_grad():
        outputs = _outputs(run(*leaves))
        if not any(leaf.requires_grad for leaf in leaves):
            return list(outputs)
        grads = torch.autograd.grad(
            outputs, leaves, [torch.ones_like(x) for x in outputs] if cotangents is None else cotangents
        )
    return [*(x.detach() for x in outputs), *grads]


def kept_bytes(run: Implementation, leaves: Sequence[Tensor]) -> int:
    """Bytes that the graph of ``run`` keeps for its backward pass, the inputs among them."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = run(*leaves)
    del outputs  # until here, so that no address is taken twice
    return sum(storages.values())


def _outputs(made: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (made,) if isinstance(made, Tensor) else tuple(made)


def _call(run: Implementation, leaves: Sequence[Tensor], cotangents: Sequence[Tensor] | None) -> Callable[[], None]:
    def call() -> None:
        forward_backward(run, leaves, cotangents)

    return call


def _problem(
    choice: Choice, use: Use, run: Implementation, leaves: Sequence[Tensor], cotangents: Sequence[Tensor] | None,
    expected: Sequence[Tensor],
) -> str | None:  # fmt: skip
    """Why a candidate cannot be chosen: it raises, breaks a compiled region, or gives something else."""
    try:
        found = forward_backward(run, leaves, cotangents)
        if use.in_region and not isinstance(run, Compiled):
            # A region that it breaks would fall back to eager as a whole.
            torch.compile(run, backend="aot_eager", dynamic=False, fullgraph=True)(*leaves)
    except Exception as failure:  # noqa: BLE001 - an extension raises anything
        return first_line(failure)
    allowed = choice.tolerance[use.dtype]
    for actual, wanted in zip(found, expected, strict=True):
        if actual.shape != wanted.shape:
            return f"it gives the shape {list(actual.shape)} in place of {list(wanted.shape)}"
        exact = torch.promote_types(wanted.dtype, torch.float32)
        actual, wanted = actual.to(exact), wanted.to(exact)
        error = float((actual - wanted).norm() / wanted.norm().clamp_min(1e-30))
        if not error <= allowed:  # so that NaN is a difference
            return f"wrong: it differs from the reference by {error:.1e}, {allowed:g} is allowed"
    return None


def first_line(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"


def _time(calls: Mapping[str, Callable[[], None]], device: torch.device, deadline: Deadline) -> dict[str, float]:
    """Median seconds of each call, in turns, so that a change of clocks meets all of them; the slow ones leave early.
    Nothing where the time was over before a median says something.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    repeats: dict[str, int] = {}
    for name, call in calls.items():
        if deadline.over:
            return {}
        repeats[name] = max(1, min(MOST_REPEATS, round(ROUND_S / max(_seconds(call, 1, device), 1e-9))))
    racing = list(calls)
    rounds = ROUNDS if calls else 0
    for number in range(rounds):
        for name in racing:
            if deadline.over:
                return {name: median(values) for name, values in samples.items()} if number >= FEWEST_ROUNDS else {}
            samples[name].append(_seconds(calls[name], repeats[name], device))
        if number >= 1:
            best = min(min(samples[name]) for name in racing)
            racing = [name for name in racing if min(samples[name]) <= TOO_SLOW * best]
    return {name: median(values) for name, values in samples.items()}


def _seconds(call: Callable[[], None], repeats: int, device: torch.device) -> float:
    """Of one call, on average over ``repeats``: of the device on a GPU, of the process on a CPU."""
    if device.type != "cuda":
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - begin) / repeats
    torch.cuda.synchronize(device)
    begin = time.perf_counter()
    call()
    host = time.perf_counter() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # The device waits until the host has queued everything, so that no gap between two launches is timed.
    torch.cuda._sleep(int(1.1 * host * repeats * HOST_LEAD_CYCLES_PER_S))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats
