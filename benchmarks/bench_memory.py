"""Memory of activations against batch and depth, with and without recomputing LayerNorm and GELU.

    python -m benchmarks.bench_memory                            # curves of vit_b's width, G = 2
    python -m benchmarks.bench_memory --target                   # B-48 at batch 256 against the 28 GB of the design

On a CPU the tensors that autograd keeps are counted (torch.autograd.graph.saved_tensors_hooks, each storage once), in
bfloat16 with SDPA, as on a GPU. One thing differs there and is taken off: the gradient of the predictions is kept in
float32 on a CPU, in bfloat16 on a GPU. Kept bytes are affine in the batch, so a large batch follows from two small
ones; `kind` says "counted" or "counted, affine". On a GPU it is torch's peak of a forward and backward pass over what
was allocated before it, gradients included ("peak").
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measure import device
from benchmarks.report import Results
from mirl.engine.accounting.memory import state_bytes
from mirl.engine.models import MIRL, Execution, ModelConfig, model_config

RESULTS = Path(__file__).resolve().parent / "results"
GIB = 2**30
TARGET_BYTES = 28e9
SMALL = (1, 3)  # batches from which others are extrapolated


def make_model(config: ModelConfig, recompute: bool, place: torch.device) -> MIRL:
    model = MIRL(config).to(place, torch.bfloat16)
    model.set_execution(Execution.for_device(place, recompute=recompute))
    return model


def make_inputs(config: ModelConfig, batch: int, place: torch.device) -> tuple[Tensor, Tensor]:
    shape = (batch, config.image_height, config.image_width, config.channels)
    return torch.randint(0, 256, shape, dtype=torch.uint8).to(place), torch.rand(batch, config.num_patches).to(place)


def kept_bytes(model: MIRL, batch: int) -> int:
    """Bytes of all storages that the graph of one forward pass holds, parameters and buffers left out."""
    config = model.config
    images, noise = make_inputs(config, batch, torch.device("cpu"))
    model.resolve_attention(torch.device("cpu"))  # runs some
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(images, noise=noise)
    assert output.loss.requires_grad
    wider_gradient = 2 * batch * len(model.terms) * config.num_masked * config.patch_pixels
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) - wider_gradient


def peak_bytes(model: MIRL, batch: int, place: torch.device) -> int:
    """torch's peak of one forward and backward pass, over what was allocated before it."""
    images, noise = make_inputs(model.config, batch, place)
    for _ in range(2):  # the first makes work spaces
        model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(images, noise=noise).loss.backward()
        torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def activations(config: ModelConfig, batches: Sequence[int], recompute: bool, place: torch.device) -> list[dict]:
    """One entry of ``memory`` in the results for each batch."""
    model = make_model(config, recompute, place)
    rows = []
    if place.type == "cpu":
        few, more = (kept_bytes(model, batch) for batch in SMALL)
        slope = (more - few) / (SMALL[1] - SMALL[0])
    for batch in batches:
        if place.type == "cuda":
            amount, kind = peak_bytes(model, batch, place), "peak"
        elif batch in SMALL:
            amount, kind = (few, more)[SMALL.index(batch)], "counted"
        else:
            amount, kind = few + slope * (batch - SMALL[0]), "counted, affine"
        rows.append(
            {
                "model": config.name,
                "variant": config.variant,
                "batch": batch,
                "depth": config.depth,
                "recompute": "norm and GELU" if recompute else "nothing",
                "activations_gib": round(amount / GIB, 4),
                "kind": kind,
            }
        )
    return rows


def target(results: Results, batch: int, place: torch.device) -> str:
    """B-48 without and with recomputation, and the states that come on top; a few lines of text."""
    config = model_config("vit_b_48", attention="sdpa" if place.type == "cpu" else "auto")
    lines = [f"vit_b_48, paper variant, batch {batch}, bfloat16, no block recomputed; the target is 28 GB:"]
    for recompute in (False, True):
        gc.collect()
        (row,) = activations(config, [batch], recompute, place)
        results.add_memory(row)
        kept = row["activations_gib"] * GIB
        for ranks in (1, 8):
            total = kept + state_bytes(config, 2, ranks)
            verdict = "fits" if total <= TARGET_BYTES else f"{(total - TARGET_BYTES) / 1e9:.1f} GB too much"
            lines.append(
                f"  recomputed {row['recompute']:13}  activations {kept / 1e9:5.1f} GB ({row['kind']}), with the "
                f"states of ZeRO-2 over {ranks} rank{'s' if ranks > 1 else ''} {total / 1e9:5.1f} GB: {verdict}"
            )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    place = device()
    on_gpu = place.type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", nargs="+", type=int, default=[64, 128, 256] if on_gpu else [1, 3, 64, 256])
    parser.add_argument("--depth", nargs="+", type=int, default=[12, 24, 48] if on_gpu else [6, 12, 24])
    parser.add_argument("--target", action="store_true", help="only B-48 at batch 256, against the design's target")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    results, started = Results(), datetime.now(UTC)
    label = "memory-b48" if options.target else "memory"
    results.keep(options.out, started, label)
    if options.target:
        print(target(results, 256, place))
    else:
        for depth in options.depth:
            for recompute in (False, True):
                config = model_config("vit_b", depth=depth, attention="sdpa" if place.type == "cpu" else "auto")
                for row in activations(config, options.batch, recompute, place):
                    results.add_memory(row)
        print(results.table())
    for path in results.write(options.out, started, label=label):
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
