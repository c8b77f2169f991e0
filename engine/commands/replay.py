"""`mirl replay RUN STEP` computes one step of a pre-training run again, and looks at every block."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mirl.engine.commands.device_flag import add_device, device_of_process
from mirl.engine.configuration.flags import Parser
from mirl.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Print the parts of the step, block by block; write them to --json. The run is only read."""
    arguments = _parser().parse_args(argv)
    try:
        step = int(arguments.step)
    except ValueError:
        raise UserError(f"step is {arguments.step!r}: give a whole number, as the log numbers steps") from None
    if arguments.json and arguments.json.exists():
        raise UserError(f"json is {arguments.json}, which exists: give another name")
    if arguments.json and arguments.json.resolve().is_relative_to(arguments.run.resolve()):
        raise UserError(f"json is {arguments.json}, in the run, which is only read: give a place outside of it")
    device_of_process(arguments.device)
    # This imports torch and DeepSpeed, so it comes late: a wrong flag should be told at once.
    from mirl.engine.pretraining.replay import replay

    found = replay(arguments.run, step, device=arguments.device)
    print("\n".join(_lines(found)))
    if arguments.json:
        arguments.json.write_text(json.dumps(_without_nan(found), indent=2) + "\n")
        print(f"wrote {arguments.json}")
    return 0


def _lines(found: dict[str, Any]) -> list[str]:
    terms = "".join(f"  {name} {value:.6g}" for name, value in found["terms"].items())
    lines = [
        f"step {found['step']} from {found['checkpoint']}",
        f"loss {found['loss']:.9g}{terms}",
        f"gradient norm before clipping {found['gradient_norm']:.6g}, learning rate {found['lr']:.6g}",
    ]
    if found["difference"] is not None:
        lines.append(f"logged loss {found['logged_loss']:.9g}, difference {found['difference']:.3g}")
    else:
        lines.append("the log has no finite loss of this step alone (--log-every 1 writes one)")
    width = max(len(row["block"]) for row in found["blocks"])
    lines.append(f"{'block':<{width}}  largest activation  gradient norm")
    for row in found["blocks"]:
        peak = "" if row["largest_activation"] is None else f"{row['largest_activation']:.4g}"
        lines.append(f"{row['block']:<{width}}  {peak:>18}  {row['gradient_norm']:>13.4g}")
    lines += [f"file {path}" for path in found["files"]]
    for what in ("activation", "gradient"):
        first = found[f"first_nonfinite_{what}"]
        lines.append(f"first {what} that is not finite: {first or 'none'}")
    return lines


def _without_nan(value: Any) -> Any:
    """Return ``value`` with None for numbers that are not finite, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and (value != value or abs(value) == float("inf")) else value


def _parser() -> Parser:
    parser = Parser(prog="mirl replay", description="Compute a step of a run again and look at each block.")
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a pre-training run")
    parser.add_argument("step", metavar="STEP", help="the step, numbered as in the log")
    add_device(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found here too")
    return parser
