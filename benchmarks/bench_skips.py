"""What each exact skip, and each form of execution, brings: forward and backward pass, one thing changed at a time.

    python -m benchmarks.bench_skips [--model vit_b] [--batch 8] [--rounds 5]

All forms share their Parameters and take turns. A gain is the time without the thing over the time with it, of medians
and of the fastest rounds; on a CPU it is processor time, which neighbours on the machine disturb less than wall time.
FLOPs are counted with and without the skip (engine/accounting/flops.py): where time is matrix products, that is the
gain to expect.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Sequence

import torch

from benchmarks.measure import device
from mirl.engine.accounting.flops import training_flops_per_image
from mirl.engine.models import MIRL, MODEL_NAMES, ExactSkips, Execution, model_config

ALL = "all skips"


def forms(model: MIRL) -> dict[str, MIRL]:
    """Name -> model, every one with the Parameters of ``model``."""
    made = {ALL: model}
    variants: dict[str, tuple[ExactSkips, Execution]] = {
        f"without {field.name}": (ExactSkips(**{field.name: False}), Execution())
        for field in dataclasses.fields(ExactSkips)
    }
    nothing = dict.fromkeys((field.name for field in dataclasses.fields(ExactSkips)), False)
    variants["no skips"] = (ExactSkips(**nothing), Execution())
    for name in ("fused_norm", "fused_gelu", "recompute"):
        variants[f"with {name}"] = (ExactSkips(), Execution(**{name: True}))
    model.set_execution(Execution())
    for name, (skips, execution) in variants.items():
        other = MIRL(model.config, skips).to(model.encoder.cls_token.device)
        other.load_state_dict(model.state_dict(keep_vars=True), assign=True)
        other.set_execution(execution)
        made[name] = other
    return made


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODEL_NAMES, default="vit_b")
    parser.add_argument("--variant", default="paper", choices=("paper", "release"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 weights")
    options = parser.parse_args(argv)
    place = device()
    config = model_config(options.model, variant=options.variant, head_init="xavier")  # zero heads pass no gradient on
    torch.manual_seed(0)
    model = MIRL(config).to(place, torch.bfloat16 if options.bf16 else torch.float32)
    images = torch.randint(0, 256, (options.batch, 224, 224, 3), dtype=torch.uint8, device=place)
    noise = torch.rand(options.batch, config.num_patches, device=place)
    models = forms(model)
    times: dict[str, list[float]] = {name: [] for name in models}
    clock = time.process_time if place.type == "cpu" else time.perf_counter
    for number in range(options.rounds + 1):
        for name, form in models.items():
            model.zero_grad(set_to_none=True)
            if place.type == "cuda":
                torch.cuda.synchronize()
            started = clock()
            form(images, noise=noise).loss.backward()
            if place.type == "cuda":
                torch.cuda.synchronize()
            if number:  # the first round warms up
                times[name].append(1e3 * (clock() - started))
    base, fastest = statistics.median(times[ALL]), min(times[ALL])
    print(f"{options.model} {options.variant}, batch {options.batch}, {model.weight_dtype}, {place.type}")
    print("| form | ms | over all skips, median | fastest | FLOPs over all skips |\n|---|---|---|---|---|")
    counted = training_flops_per_image(config, ExactSkips())
    for name, values in times.items():
        flops = training_flops_per_image(config, models[name].skips) / counted
        print(
            f"| {name} | {statistics.median(values):.0f} | {statistics.median(values) / base:.3f} | "
            f"{min(values) / fastest:.3f} | {flops:.3f} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
