"""`mirl validate-data`, `prepare-data`, `make-index` and `bench-loader` run the tools of `dataloaders`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mirl.engine.commands.device_flag import add_device, device_of_process
from mirl.engine.configuration.flags import BracketedDefaults, Parser, image_size
from mirl.errors import UserError


def _parser(name: str, description: str) -> Parser:
    return Parser(prog=f"mirl {name}", description=description, formatter_class=BracketedDefaults)


def _add_source(parser: Parser) -> None:
    parser.add_argument(
        "--index-dir", type=Path, help="where the .idx files of tar shards are; none: beside the shards"
    )
    parser.add_argument("--workers", type=int, help="parallel workers; none: one a core")


def _add_window(parser: Parser) -> None:
    parser.add_argument(
        "--window", type=float, nargs=2, metavar=("C", "W"),
        help="centre and width of the numbers of scans that become 0 to 1; none: those of the file",
    )  # fmt: skip


def _windowed(places: Sequence[Path], window: Sequence[float] | None) -> list[Path]:
    from mirl.dataloaders.sources.containers import with_window

    if window and window[1] <= 0:
        raise UserError(f"window is {window[0]:g} {window[1]:g}: give its centre and its width, above 0, e.g. 40 400")
    return with_window(places, window)


def validate_data(argv: Sequence[str]) -> int:
    """Decode every image and write a manifest; exit code 1 if an image is broken."""
    parser = _parser(
        "validate-data", "Decode every image in full and write a manifest; training leaves the broken ones out."
    )
    parser.add_argument("data", type=Path, metavar="PATH", help="folder, text list or tar shards")
    parser.add_argument("--manifest", type=Path, help="file to write; none: mirl-manifest.tsv in PATH")
    parser.add_argument("--channels", type=int, default=3, help="channels of an image")
    _add_window(parser)
    _add_source(parser)
    arguments = parser.parse_args(argv)
    from mirl.dataloaders.tools.validate import validate_data as run

    report = run(
        _windowed([arguments.data], arguments.window)[0],
        manifest=arguments.manifest,
        index_dir=arguments.index_dir,
        channels=arguments.channels,
        workers=arguments.workers,
    )
    print(report)
    return 1 if report.bad else 0


def prepare_data(argv: Sequence[str]) -> int:
    """Print what was written and how the crops change."""
    parser = _parser("prepare-data", "Re-encode images to small JPEG files or tar shards; run it again to go on.")
    parser.add_argument("src", type=Path, metavar="SRC", help="folder, text list or tar shards")
    parser.add_argument("dst", type=Path, metavar="DST", help="folder to write")
    parser.add_argument(
        "--short-side", type=int, default=256, help="shorter side in pixels; smaller images keep their size"
    )
    parser.add_argument("--quality", type=int, default=90, help="JPEG quality")
    parser.add_argument("--shard-size", type=int, help="images per tar shard; none: loose files")
    parser.add_argument("--train-size", type=int, default=224, help="image side that the report on crops assumes")
    _add_source(parser)
    arguments = parser.parse_args(argv)
    from mirl.dataloaders.tools.prepare import prepare_data as run

    print(
        run(
            arguments.src,
            arguments.dst,
            short_side=arguments.short_side,
            quality=arguments.quality,
            shard_size=arguments.shard_size,
            train_size=arguments.train_size,
            index_dir=arguments.index_dir,
            workers=arguments.workers,
        )
    )
    return 0


def make_index(argv: Sequence[str]) -> int:
    """Print the indexes that were written."""
    parser = _parser("make-index", "Write an index beside every tar shard, so that images can be read in any order.")
    parser.add_argument("data", type=Path, metavar="PATH", help="a tar file or a folder of them")
    parser.add_argument("--index-dir", type=Path, help="where to write; none: beside each tar")
    parser.add_argument("--workers", type=int, default=4, help="shards at a time")
    parser.add_argument(
        "--image-part",
        metavar="EXT",
        help="the part of each sample that is the image, e.g. jpg or depth.png, or `each` for all image parts; "
        "none: the one without a dot in its extension",
    )
    parser.add_argument("--force", action="store_true", help="also where the index is newer than the tar")
    parser.add_argument(
        "--allow-cut", action="store_true", help="index the whole members of a tar that ends in the middle"
    )
    arguments = parser.parse_args(argv)
    from mirl.dataloaders.sources.tar_index import find_shards
    from mirl.dataloaders.sources.tar_index import make_index as run
    from mirl.dataloaders.sources.tar_source import TarSource

    written = run(
        arguments.data,
        index_dir=arguments.index_dir,
        workers=arguments.workers,
        force=arguments.force,
        allow_cut=arguments.allow_cut,
        image_part=arguments.image_part,
    )
    print(f"{len(written)} indexes: {written[0].parent}")
    print(f"data {TarSource(find_shards(arguments.data), index_dir=arguments.index_dir).ledger}")
    return 0


def bench_loader(argv: Sequence[str]) -> int:
    """Print images/s of the training loader for each number of threads and image size."""
    parser = _parser("bench-loader", "Measure how fast the training loader reads, decodes and crops.")
    parser.add_argument("data", type=Path, nargs="*", metavar="PATH", help="data set; none: the demo photographs")
    parser.add_argument(
        "--image-size", type=image_size, nargs="+", default=[(224, 224)], help="SIDE or HxW, one or more [224]"
    )
    parser.add_argument("--threads", type=int, nargs="+", help="decoding threads to try; none: 1, 2, 4 ... cores")
    parser.add_argument("--micro-batch", type=int, default=64, help="images per batch")
    parser.add_argument("--seconds", type=float, default=10.0, help="time per measurement")
    parser.add_argument("--channels", type=int, default=3, help="channels of an image")
    parser.add_argument(
        "--index-dir", type=Path, help="where the .idx files of tar shards are; none: beside the shards"
    )
    _add_window(parser)
    add_device(parser)
    arguments = parser.parse_args(argv)
    device = device_of_process(arguments.device)
    from mirl.dataloaders import prepare_demo
    from mirl.dataloaders.tools.bench import bench_loader as run

    run(
        _windowed(arguments.data, arguments.window) or prepare_demo(many=True),
        image_sizes=arguments.image_size,
        threads=arguments.threads,
        micro_batch=arguments.micro_batch,
        seconds=arguments.seconds,
        device_id=device.index if device.type == "cuda" else None,
        channels=arguments.channels,
        index_dir=arguments.index_dir,
    )
    return 0
