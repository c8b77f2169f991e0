"""What Inductor makes of a compiled region for an H100, on a machine without one.

Dynamo and AOT autograd trace the region on CPU tensors of the real shapes, of which nothing is computed. The two graphs
are moved to fake CUDA tensors, and Inductor lowers, fuses and schedules them with the properties of an H100. It stops
before anything is compiled. Imports of torch's compiler reach into its modules: this file was read from torch 2.14.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx

TORCH = "2.14"
TRITON = "a Triton kernel of ours"
H100 = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, total_memory=85 * 10**9,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20, gcnArchName="", is_integrated=0, uuid="0",
)  # fmt: skip


class _HopperDriver:
    """What Triton and Inductor ask of a driver before they compile."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> Any:
        return importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)


@dataclass
class Lowered:
    """One direction of a region. ``kernels``: what each launch is made of, with its bytes; ``fallbacks``: operators
    that Inductor leaves to ATen besides products and attention.
    """

    kernels: list[tuple[str, int]] = field(default_factory=list)
    fallbacks: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(moved for _, moved in self.kernels)


@dataclass
class Region:
    """``saved``: bytes that the forward graph keeps for the backward one, beside its own inputs."""

    forward: Lowered
    backward: Lowered
    saved: int


class _Stop(Exception):
    """Enough is known."""


def lower_region(method: Callable[..., Any], arguments: Sequence[Any], *, results: int, budget: float = 1.0) -> Region:
    """``method(*arguments)``, which has ``results`` outputs, lowered for an H100.

    budget: torch's activation memory budget, as `mirl.engine.training.compiling` sets it for recomputation.
    """
    import torch._functorch.config as functorch_config
    import torch._inductor.config as inductor_config

    with (
        _h100(),
        functorch_config.patch(activation_memory_budget=budget),
        inductor_config.patch(compile_threads=1, fx_graph_cache=False),
    ):
        module, inputs = _traced(method, arguments)
        graphs = _both_directions(module, inputs)
        saved = _saved_bytes(graphs["forward"][0], results)
        return Region(*(_lower(*graphs[name], backward=name == "backward") for name in ("forward", "backward")), saved)


@contextlib.contextmanager
def _h100() -> Iterator[None]:
    names = ("_inductor.scheduler", "utils._triton", "_inductor.compile_fx", "_dynamo.device_interface")
    scheduler, triton_utils, compile_fx, interface = (importlib.import_module(f"torch.{name}") for name in names)
    driver = importlib.import_module("triton.runtime.driver").driver
    # Not available all the same: with DeepSpeed imported torch would conclude from the count that it is, and ask it.
    answers: dict[str, Any] = {
        "is_available": False,
        "get_device_properties": H100, "get_device_capability": (9, 0), "get_device_name": H100.name,
        "device_count": 1, "current_device": 0, "synchronize": None,
    }  # fmt: skip
    with contextlib.ExitStack() as entered:
        for name, answer in answers.items():
            for place in (torch.cuda, interface.CudaInterface):  # which keeps the functions of its import
                if hasattr(place, name):
                    stand_in = staticmethod(lambda *a, _answer=answer, **k: _answer)
                    entered.enter_context(mock.patch.object(place, name, stand_in))
        entered.enter_context(mock.patch.dict(interface.caching_worker_device_properties, {"cuda": [H100]}))
        entered.enter_context(mock.patch.dict(interface.caching_worker_current_devices, {"cuda": 0}))
        for module in (scheduler, triton_utils):
            if hasattr(module, "has_triton"):
                entered.enter_context(mock.patch.object(module, "has_triton", lambda *a, **k: True))
        entered.enter_context(mock.patch.object(compile_fx, "_check_triton_bf16_support", lambda graph: None))
        entered.enter_context(mock.patch.object(driver, "_active", _HopperDriver()))
        yield


def _traced(method: Callable[..., Any], arguments: Sequence[Any]) -> tuple[fx.GraphModule, list[Any]]:
    found: list[tuple[fx.GraphModule, list[Any]]] = []

    def backend(module: fx.GraphModule, inputs: list[Any]) -> Any:
        found.append((module, list(inputs)))
        raise _Stop

    torch._dynamo.reset()
    try:
        torch.compile(method, backend=backend, fullgraph=True, dynamic=False)(*arguments)
    except Exception:  # noqa: BLE001 - _Stop, as dynamo wraps it; without a graph it was another one
        if not found:
            raise
    finally:
        torch._dynamo.reset()
    return found[0]


def _both_directions(module: fx.GraphModule, inputs: list[Any]) -> dict[str, tuple[fx.GraphModule, list[Any]]]:
    from torch._functorch._aot_autograd.utils import make_boxed_func
    from torch._functorch.aot_autograd import aot_module_simplified
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import _recursive_joint_graph_passes
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.fake_tensor import FakeTensorMode

    found: dict[str, tuple[fx.GraphModule, list[Any]]] = {}

    def partition(graph: fx.GraphModule, joint_inputs: Any, **settings: Any) -> tuple[Any, Any]:
        _recursive_joint_graph_passes(graph)
        forward, backward = min_cut_rematerialization_partition(graph, joint_inputs, compiler="inductor", **settings)
        placeholders = [node.meta["val"] for node in backward.graph.nodes if node.op == "placeholder"]
        found["backward"] = (copy.deepcopy(backward), placeholders)
        return forward, backward

    def keep(graph: fx.GraphModule, graph_inputs: Sequence[Any]) -> Any:
        found.setdefault("forward", (graph, list(graph_inputs)))
        return make_boxed_func(graph.forward)

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(x, static_shapes=True) if isinstance(x, Tensor) else x for x in inputs]
    with tracing(TracingContext(mode)):
        aot_module_simplified(
            module, fakes, fw_compiler=keep, bw_compiler=lambda graph, _: make_boxed_func(graph.forward),
            partition_fn=partition, decompositions=select_decomp_table(), keep_inference_input_mutations=True,
        )  # fmt: skip
    return found


def _saved_bytes(forward: fx.GraphModule, results: int) -> int:
    outputs = list(forward.graph.nodes)[-1].args[0]
    kept = {node for node in outputs[results:] if isinstance(node, fx.Node) and node.op != "placeholder"}
    values = [node.meta["val"] for node in kept if isinstance(node.meta.get("val"), Tensor)]
    return sum(value.numel() * value.element_size() for value in values)


def _lower(graph: fx.GraphModule, inputs: list[Any], *, backward: bool) -> Lowered:
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.graph import GraphLowering
    from torch._inductor.utils import BoxedBool
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    for node in graph.graph.nodes:
        if node.op == "call_function" and isinstance(node.kwargs.get("device"), torch.device):
            node.kwargs = {**node.kwargs, "device": torch.device("cuda:0")}
        node.meta.pop("val", None)
    graph.recompile()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        moved = [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda:0") if isinstance(x, Tensor) else x
            for x in inputs
        ]
    FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*moved)
    lowered = Lowered()

    def schedule(self: Any) -> Any:
        self.init_wrapper_code()
        self._update_scheduler()
        for node in self.scheduler.nodes:
            _describe(node, lowered)
        raise _Stop

    weights = [i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.ndim <= 2]
    with (
        mock.patch.object(GraphLowering, "compile_to_module", schedule),
        tracing(TracingContext(mode)),
        V.set_fake_mode(mode),
    ):
        try:
            compile_fx_inner(
                graph, moved, is_backward=backward, static_input_idxs=[] if backward else weights,
                cudagraphs=BoxedBool(False),
            )  # fmt: skip
        except Exception as error:  # noqa: BLE001 - _Stop, as Inductor wraps it
            if "_Stop" not in repr(type(error)) and not lowered.kernels:
                raise
    return lowered


def _describe(node: Any, lowered: Lowered) -> None:
    kind, moved = type(node).__name__, node.get_read_write_buffers_sizes()
    if kind == "NopKernelSchedulerNode":
        return
    if kind == "ExternKernelSchedulerNode":
        inner = node.node
        if type(inner).__name__ == "MultiOutput":  # one of several results of a kernel
            return
        if type(inner).__name__ == "UserDefinedTritonKernel":  # launched by the compiled code itself
            lowered.kernels.append((TRITON, moved))
            return
        name = getattr(inner, "python_kernel_name", None) or str(getattr(inner, "op_overload", type(inner).__name__))
        if "mm" not in name and "attention" not in name:
            lowered.fallbacks.append(name)
        lowered.kernels.append((name, moved))
        return
    targets = {
        str(origin.target).split(".")[-2] if "." in str(origin.target) else str(origin.target)
        for part in node.get_nodes()
        for origin in getattr(part.node, "origins", [])
    }
    lowered.kernels.append(("+".join(sorted(targets)), moved))
