"""`mirl export CHECKPOINT --to FORMAT --out PATH` writes a checkpoint for other libraries.

FORMAT is timm, hf, safetensors, onnx, torch-export, mae or mmseg; the encoder, the classifier or the segmenter is
written.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mirl.dataloaders.decoding.crops import evaluation_crop
from mirl.engine.checkpoints.best import NAMES as WEIGHTS
from mirl.engine.checkpoints.kinds import CLASSIFIER, SEGMENTER, Given, given
from mirl.engine.commands.checkpoint_flags import add_checkpoint
from mirl.engine.configuration.flags import Parser, image_size
from mirl.errors import UserError

LOADING = {
    "timm": 'timm.create_model("local-dir:{out}", pretrained=True)',
    "hf": 'transformers.ViTModel.from_pretrained("{out}", add_pooling_layer=False)',
    "safetensors": 'safetensors.torch.load_file("{out}")',
    "onnx": 'onnxruntime.InferenceSession("{out}")',
    "torch-export": 'torch.export.load("{out}").module()',
}
SUFFIXES = {"safetensors": ".safetensors", "onnx": ".onnx", "torch-export": ".pt2"}
POOLED = ("timm", "onnx", "torch-export")
DENSE = ("mae", "mmseg")  # code of detection and segmentation reads these
LOADING_CLASSIFIER = LOADING | {"hf": 'transformers.ViTForImageClassification.from_pretrained("{out}")'}


def run(argv: Sequence[str]) -> int:
    """Write the encoder and print how to load it. UserError if it cannot be written as asked."""
    arguments = _parser().parse_args(argv)
    if arguments.out.exists():
        raise UserError(f"out is {arguments.out}, which exists: give another name")
    suffix = SUFFIXES.get(arguments.to)
    if suffix and arguments.out.suffix != suffix:
        raise UserError(f"out is {arguments.out}: give a file name that ends in {suffix}")
    if arguments.pool and arguments.to not in POOLED:
        raise UserError(
            f"pool is {arguments.pool!r} and to is {arguments.to!r}: an encoder is pooled in {', '.join(POOLED)} alone"
        )
    if not arguments.average:
        return _export(arguments, given(arguments.checkpoint, arguments.which))
    if arguments.which or arguments.weights:
        raise UserError("average is of a run's newest checkpoints: leave out --which and --weights")
    from mirl.engine.checkpoints.averaging import newest_of, write_average

    chosen = newest_of(arguments.checkpoint, arguments.average)
    with tempfile.TemporaryDirectory(dir=arguments.out.parent, prefix=f".{arguments.out.name}-") as folder:
        averaged = Path(folder) / f"mean of {', '.join(path.name for path in chosen)}"
        write_average(averaged, chosen)
        return _export(arguments, given(averaged))


def _export(arguments: argparse.Namespace, found: Given) -> int:
    """Write ``found`` as ``arguments`` say, and print how to load it."""
    if found.kind != CLASSIFIER and arguments.weights:
        raise UserError(
            f"weights is {arguments.weights!r} and {arguments.checkpoint} is no fine-tuned classifier: leave it out"
        )
    print(f"checkpoint {found}", flush=True)

    # These import torch, so they come late: a wrong flag should be told at once.
    if found.kind == SEGMENTER or arguments.to in DENSE:
        from mirl.engine.commands.export_dense import export_dense

        if arguments.encoder_only:
            raise UserError(f"encoder_only is given and to is {arguments.to!r}: leave it out; mae writes encoders")
        print("\n".join(export_dense(found, arguments.to, arguments.out, arguments.image_size)))
        return 0
    from mirl.engine.commands.export_formats import EXPORTS, read_classifier, read_encoder
    from mirl.engine.models.interop.huggingface import crops_as_evaluation
    from mirl.engine.models.interop.timm_keys import grid_of

    common = {"image_size": arguments.image_size, "pool": arguments.pool}
    if found.kind == CLASSIFIER:
        weights = arguments.weights or found.weights
        exported = read_classifier(found.checkpoint, weights=weights, encoder_only=arguments.encoder_only, **common)
        print(f"weights {weights}: {WEIGHTS[weights]}")
    else:
        exported = read_encoder(found.checkpoint, **common)
    config, encoder, size = exported.config, exported.encoder, exported.image_size
    grid = grid_of(config, size)
    if arguments.to in ("onnx", "torch-export"):
        from mirl.engine.commands.export_graphs import export_onnx, export_torch

        (export_onnx if arguments.to == "onnx" else export_torch)(arguments.out, exported)
    else:
        EXPORTS[arguments.to](arguments.out, exported)
    kind = "classifier" if exported.is_classifier else "encoder"
    positions = f"positions of {config.grid[0]}x{config.grid[1]} patches"
    if grid != config.grid:
        positions += f", resampled to {grid[0]}x{grid[1]}"
    print(
        f"wrote {arguments.out}: {kind} of {config.label}, {len(encoder)} weights, depth {config.built_depth}, width "
        f"{config.width}, image {size[0]}x{size[1]}x{config.channels}; {positions}"
    )
    print(f"images: values in [0, 1], mean {_numbers(config.mean)}, std {_numbers(config.std)}")
    if arguments.to == "hf" and not crops_as_evaluation(size):
        print(
            "crop: the whole image squeezed into its size; transformers has no processor that takes the crop of our "
            f"evaluation where images are not square ({evaluation_crop(size)})"
        )
    else:
        print(f"crop: {evaluation_crop(size)}, as in our evaluation")
    loading = LOADING_CLASSIFIER if exported.is_classifier else LOADING
    print("load it: " + loading[arguments.to].format(out=arguments.out))
    return 0


def _parser() -> Parser:
    parser = Parser(prog="mirl export", description="Write the encoder of a checkpoint in another library's format.")
    add_checkpoint(parser, "a pre-trained model, an encoder, a fine-tuned classifier or a segmenter")
    parser.add_argument(
        "--to", required=True, choices=sorted([*LOADING, *DENSE]),
        help="timm: a folder for timm.create_model; hf: a folder for transformers' ViTModel, or its UperNet; "
        "safetensors: one file; onnx and torch-export: one file with a graph that runs without this package; mae: a "
        ".pth for ViTDet and BEiT-like code; mmseg: a .pth for mmsegmentation",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="PATH", help="what to write; must not exist")
    parser.add_argument(
        "--image-size", type=image_size, metavar="SIDE|HxW",
        help="size of the images it will see; positions are resampled [the checkpoint's]",
    )  # fmt: skip
    parser.add_argument(
        "--pool",
        choices=("avg", "token"),
        help="of an encoder, in timm and graphs: mean of the patch tokens, or the class token [avg]",
    )
    parser.add_argument(
        "--encoder-only", action="store_true", help="of a classifier: its encoder as fine-tuned, without the head"
    )
    parser.add_argument(
        "--average",
        type=int,
        default=0,
        metavar="N",
        help="of a pre-training run: the mean of its newest N checkpoints",
    )
    parser.add_argument(
        "--weights",
        choices=sorted(WEIGHTS),
        help="of a classifier: as training left them, or their average [those that made it the best, else last]",
    )
    return parser


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values)
