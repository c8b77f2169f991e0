"""The console command `mirl` looks a name up and calls it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence

from mirl.engine.configuration.help_lines import nearest
from mirl.engine.errors import run_entry_point
from mirl.engine.version import __version__
from mirl.errors import UserError


def _pretrain(argv: Sequence[str]) -> int:
    from mirl.engine.pretrain import main

    return main(list(argv))


def _summary(argv: Sequence[str]) -> int:
    from mirl.engine.commands.summary_command import main

    return main(argv)


def _visualize(argv: Sequence[str]) -> int:
    from mirl.engine.commands.visualize import main

    return main(argv)


def _data_command(name: str) -> Callable[[Sequence[str]], int]:
    def command(argv: Sequence[str]) -> int:
        from mirl.engine.commands import data as data_commands

        return getattr(data_commands, name)(argv)

    return command


def _finetune(argv: Sequence[str]) -> int:
    from mirl.engine.finetune import main

    return main(list(argv))


def _segment(argv: Sequence[str]) -> int:
    from mirl.engine.segment import main

    return main(list(argv))


def _detect(argv: Sequence[str]) -> int:
    from mirl.engine.detect import main

    return main(list(argv))


def _probe(argv: Sequence[str]) -> int:
    from mirl.engine.commands.probe import main

    return main(argv)


def _embed(argv: Sequence[str]) -> int:
    from mirl.engine.commands.embed import main

    return main(argv)


def _depth_report(argv: Sequence[str]) -> int:
    from mirl.engine.commands.depth_report import main

    return main(argv)


def _evaluate(argv: Sequence[str]) -> int:
    from mirl.engine.commands.evaluate import main

    return main(argv)


def _predict(argv: Sequence[str]) -> int:
    from mirl.engine.commands.predict import main

    return main(argv)


def _import(argv: Sequence[str]) -> int:
    from mirl.engine.commands.import_weights import run

    return run(argv)


def _export(argv: Sequence[str]) -> int:
    from mirl.engine.commands.export import run

    return run(argv)


def _average(argv: Sequence[str]) -> int:
    from mirl.engine.commands.average import main

    return main(argv)


def _doctor(argv: Sequence[str]) -> int:
    from mirl.engine.commands.doctor import main

    return main(argv)


def _config(argv: Sequence[str]) -> int:
    from mirl.engine.commands.config_command import main

    return main(argv)


def _report(argv: Sequence[str]) -> int:
    from mirl.engine.commands.report import main

    return main(argv)


def _replay(argv: Sequence[str]) -> int:
    from mirl.engine.commands.replay import main

    return main(argv)


def _plan(argv: Sequence[str]) -> int:
    from mirl.engine.commands.plan import main

    return main(argv)


# Each command imports what it needs when it is called, so that `mirl --help` answers at once.
COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "pretrain": (_pretrain, "pre-train a model on this machine (several ranks: deepspeed engine/pretrain.py)"),
    "finetune": (
        _finetune,
        "fine-tune a pre-trained encoder as a classifier (several ranks: deepspeed engine/finetune.py)",
    ),
    "segment": (
        _segment,
        "train a segmenter, UperNet on a pre-trained encoder (several ranks: deepspeed engine/segment.py)",
    ),
    "detect": (
        _detect,
        "train a detector with masks, Mask R-CNN on a pre-trained encoder (several ranks: deepspeed engine/detect.py)",
    ),
    "evaluate": (_evaluate, "accuracy of a fine-tuned classifier, by class and in all, and its confusions"),
    "predict": (_predict, "classes of images, by a classifier; objects in them, by a detector"),
    "probe": (_probe, "linear probe and nearest neighbours on frozen features"),
    "embed": (_embed, "features of every image of a data set, to a .npz, .parquet or .safetensors file"),
    "depth-report": (_depth_report, "what each block does: gradient norm, probe accuracy, effect of making it fresh"),
    "import": (_import, "read a checkpoint of the MIRL release or of MAE"),
    "export": (_export, "write the encoder for timm, Hugging Face, or as plain safetensors"),
    "average": (_average, "the mean of a run's last checkpoints, or the average it kept, as a checkpoint"),
    "visualize": (_visualize, "reconstruct images with a checkpoint"),
    "validate-data": (_data_command("validate_data"), "decode every image once and write down the broken ones"),
    "prepare-data": (_data_command("prepare_data"), "re-encode a data set to small JPEG files or tar shards"),
    "make-index": (_data_command("make_index"), "index tar shards for reading in any order"),
    "bench-loader": (_data_command("bench_loader"), "measure the training loader"),
    "doctor": (_doctor, "check that every part the engine needs runs on this machine"),
    "summary": (_summary, "parameters, FLOPs, memory and time of a run, or of the models of the paper"),
    "report": (_report, "runs as one HTML page: curves, pictures, settings, events"),
    "replay": (_replay, "compute a step of a pre-training run again, and say which block is not finite"),
    "config": (_config, "print the settings that a run would have, for its --config"),
    "plan": (_plan, "predict speed, memory and days of a run on GPUs that need not be here"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(["usage: mirl COMMAND [flags]; mirl COMMAND --help tells more", "", *lines])


def dispatch(argv: Sequence[str]) -> int:
    """Run ``argv``; return the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        print(f"mirl-engine {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        raise UserError(f"unknown command {argv[0]!r}: {nearest(argv[0], COMMANDS)}choose one of {', '.join(COMMANDS)}")
    return COMMANDS[argv[0]][0](argv[1:])


def main() -> None:
    """Run the command line of the console script."""
    if sys.argv[1:2] not in (["pretrain"], ["finetune"], ["segment"], ["detect"]):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `mirl summary | head` ends quietly; a run outlives its reader
    run_entry_point(lambda: dispatch(sys.argv[1:]))


if __name__ == "__main__":
    main()
