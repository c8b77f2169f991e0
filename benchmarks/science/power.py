"""What the records of Fig. 2 show, and how many seeds would show more: the paired test and the power analysis.

    python -m benchmarks.science.power RECORDS [--scale nights] [--cores 2 --hours 5] [--out STEM]
    python -m benchmarks.science.power --predict gpu [--gpu H100] [--seeds 16]

--scale asks what a run of another scale could find, if a seed deviates there as it does in the records: an assumption,
which the records of that run then check. Seeds that chose a statistic or a size must not be those that test it: give
the run another --first-seed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path

from benchmarks.science.fresh_blocks import NONE, SCALES, Scale
from benchmarks.science.paired import detectable, deviation_limit, power, seeds_needed
from benchmarks.science.worth import ASKED, PAPER_POINTS, STATISTICS, Record, draw, read, repeats_by_seed, table

SHAPE = ("depth", "width", "heads", "patch_size", "image_side", "decoder_width", "decoder_heads")


def seed_seconds(records: list[Record]) -> dict[str, float]:
    """Mean seconds of each part, of all methods together: what one more seed costs."""
    found: dict[str, float] = defaultdict(float)
    for method in {record["method"] for record in records}:
        own = [record["seconds"] for record in records if record["method"] == method]
        for part in own[0]:
            found[part] += statistics.fmean(seconds[part] for seconds in own)
    return dict(sorted(found.items()))


def seed_seconds_of(scale: Scale, cost: dict[str, float], pilot: Scale) -> dict[str, float]:
    """Predicted from the ``cost`` of a seed of ``pilot``: seconds for every image of each part stay what they are.

    ValueError where the encoder or the images are of another shape.
    """
    differ = [name for name in SHAPE if getattr(scale, name) != getattr(pilot, name)]
    if differ:
        raise ValueError(f"--scale has another {', '.join(differ)} than the records: their seconds say nothing of it")
    images = {"pretrain": _pretrained, "look_inside": _looked_at, "finetune": finetuned}
    return {part: seconds * images[part](scale) / images[part](pilot) for part, seconds in cost.items()}


def _pretrained(scale: Scale) -> float:
    return scale.steps * scale.pretrain_batch


def _looked_at(scale: Scale) -> float:
    return scale.probe_views + scale.held_out_views + 3 * scale.gradient_views


def finetuned(scale: Scale) -> float:
    """Images of one fine-tuning, times its repeats: a look passes them forward, a third of a training step."""
    return scale.repeats * (scale.finetune.steps * scale.finetune.batch_size + scale.looks * scale.held_out_views / 3)


def analysis(records: list[Record], fresh: int, seeds: int) -> str:
    """Markdown: for each statistic of MIRL minus MAE, what ``seeds`` find and how many an effect takes."""
    lines = [
        f"| MIRL minus MAE | deviation of a seed (80 % limit) | {seeds} seeds find (at the limit) "
        f"| seeds for the paper's {PAPER_POINTS} points (at the limit) | seeds for the mean here "
        "| deviation between seeds, of a fine-tuning |",
        "|---|---|---|---|---|---|",
    ]
    for statistic in STATISTICS:
        found = read(records, statistic, fresh, ASKED[0])
        if found is None or found[0].n < 2:
            continue
        one, parts = found
        limit = deviation_limit(one)
        paper = ""
        if statistic.expected is not None:
            share = 100 * power(statistic.expected, one.deviation, seeds)
            paper = f"{_count(statistic.expected, one.deviation)} ({_count(statistic.expected, limit)}); "
            paper += f"{seeds} have a power of {share:.0f} % ({100 * power(statistic.expected, limit, seeds):.0f} %)"
        split = "" if parts is None else f"{parts.between**0.5:.3f}, {parts.within**0.5:.3f}"
        lines.append(
            f"| {statistic.name}, {statistic.unit} | {one.deviation:.3f} ({limit:.3f}) | "
            f"{detectable(one.deviation, seeds):.3f} ({detectable(limit, seeds):.3f}) | {paper} | "
            f"{_count(one.mean, one.deviation)} | {split} |"
        )
    return "\n".join(lines)


def _count(effect: float, deviation: float) -> str:
    needed = seeds_needed(effect, deviation)
    return "over 100,000" if needed is None else str(needed)


def costs(cost: dict[str, float], core_seconds: float) -> tuple[int, str]:
    """Seeds that the time pays for, and the division as a sentence."""
    seed = sum(cost.values())
    shown = " + ".join(f"{part} {value:.0f}" for part, value in cost.items())
    paid = math.floor(core_seconds / seed)
    return paid, (
        f"A seed of all methods takes {shown} = {seed:.0f} core-seconds. "
        f"{core_seconds:.0f} core-seconds pay for {core_seconds:.0f} / {seed:.0f} = {paid} seeds."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, nargs="?", help="file of run_fresh_blocks")
    parser.add_argument("--scale", choices=tuple(SCALES), help="what a run of this scale could find [that of RECORDS]")
    parser.add_argument("--cores", type=float, default=2)
    parser.add_argument("--hours", type=float, default=5, help="of each core [5: two nights of 2.5]")
    parser.add_argument("--out", type=Path, help="STEM of a table STEM.md and a picture STEM.png")
    parser.add_argument("--predict", choices=tuple(SCALES), help="time of a scale on a GPU, predicted, not measured")
    parser.add_argument("--gpu", default="H100", help="a name of mirl plan")
    parser.add_argument("--seeds", type=int, default=16, help="of --predict")
    parser.add_argument("--workers", type=int, default=4, help="of --predict")
    arguments = parser.parse_args()
    if (arguments.records is None) == (arguments.predict is None):
        parser.error("give RECORDS or --predict SCALE: one of them")
    if arguments.predict is not None:
        from benchmarks.science.predicted import prediction

        print(prediction(arguments.predict, arguments.gpu, arguments.seeds, arguments.workers))
        return
    if not arguments.records.exists():
        parser.error(f"records is {arguments.records}: give a file that run_fresh_blocks wrote")
    content = json.loads(arguments.records.read_text())
    try:
        text = report(content, arguments.scale or content["scale"], 3600 * arguments.cores * arguments.hours)
    except ValueError as error:
        parser.error(str(error))
    print(text)
    if arguments.out is not None:
        arguments.out.with_suffix(".md").write_text(text + "\n")
        draw(content["records"], content["settings"]["fresh"], arguments.out.with_suffix(".png"))


def report(content: dict, scale: str, core_seconds: float) -> str:
    """Markdown: the table of the records, the arithmetic of a run of ``scale``, the power analysis.

    ValueError: no seed of both methods; a scale whose seconds the records do not tell.
    """
    records, fresh, made = content["records"], content["settings"]["fresh"], content["scale"]
    if not repeats_by_seed(records, STATISTICS[0], fresh, ASKED[0]):
        raise ValueError("the records have no seed of both methods yet: go on with run_fresh_blocks")
    if made not in SCALES:
        raise ValueError(f"the records are of scale {made}: give those of one of {', '.join(SCALES)}")
    cost = seed_seconds(records)
    predicted = "" if scale == made else "Predicted from the seconds of the records: "
    paid, sentence = costs(seed_seconds_of(SCALES[scale], cost, SCALES[made]), core_seconds)
    lines = [
        f"{content['device']}, torch {content['versions']['torch']}, scale {made}, commit {content['commit']}",
        "",
        table(records, fresh),
        "",
        f"A run of scale {scale}. {predicted}{sentence}",
    ]
    if NONE not in {record["method"] for record in records}:
        lines.append("The records have no encoder without pre-training, whose cost is not counted.")
    return "\n".join([*lines, "", analysis(records, fresh, paid)])


if __name__ == "__main__":
    main()
