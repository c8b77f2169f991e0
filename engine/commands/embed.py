"""`mirl embed CHECKPOINT --data DATA --out FILE` writes the features of every image, with path, label and number."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mirl.engine.checkpoints.kinds import CLASSIFIER, Given, given
from mirl.engine.commands.checkpoint_flags import add_checkpoint
from mirl.engine.commands.device_flag import add_device
from mirl.engine.configuration.flags import Parser
from mirl.engine.distributed.environment import hide_gpus
from mirl.errors import UserError

SUFFIXES = (".npz", ".parquet", ".safetensors")


def main(argv: Sequence[str]) -> int:
    """Embed the images that are still missing, then write FILE; on several ranks under torchrun or srun."""
    arguments = _parser().parse_args(argv)
    out: Path = arguments.out
    if out.suffix not in SUFFIXES:
        raise UserError(f"out is {out}: give a name that ends with {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    if out.exists() and not arguments.overwrite:
        raise UserError(f"out is {out}, which exists: give another name or --overwrite")
    for name in ("batch_size", "threads"):
        if getattr(arguments, name) < 1:
            raise UserError(f"{name} is {getattr(arguments, name)}: give 1 or more")
    found = given(arguments.checkpoint, arguments.which)
    if found.kind == CLASSIFIER and arguments.pool and arguments.block is None:
        raise UserError(
            f"pool is {arguments.pool!r} and {arguments.checkpoint} is a fine-tuned classifier: leave it out"
        )

    hide_gpus(arguments.device)
    # These import torch and DALI, so they come late: a wrong flag should be told at once.
    from mirl.dataloaders.sources.paths import shown
    from mirl.engine.distributed.launch import join, leave

    if out.suffix == ".parquet":
        from mirl.engine.analysis.embedding_files import require_pyarrow

        require_pyarrow()
    ranks = join(arguments.device)
    try:
        say = (lambda line: print(line, flush=True)) if ranks.is_main else (lambda line: None)
        say(f"checkpoint {found}")
        source, labelled = _open(arguments)
        say(f"data {source.ledger}: {' '.join(map(shown, arguments.data))}")
        _embed(found, source, labelled, ranks, arguments, say)
        ranks.barrier()  # the others wait for the file, so that their launcher ends nothing too early
    finally:
        leave()
    return 0


def _open(arguments: Any) -> tuple[Any, bool]:
    """Open the data set, with labels if it has them; the second try reports any other fault."""
    from mirl.dataloaders import open_source

    options = {"index_dir": arguments.index_dir, "split": arguments.split}
    try:
        return open_source(arguments.data, labels=True, **options), True
    except UserError:
        return open_source(arguments.data, labels=False, **options), False


def _embed(found: Given, source: Any, labelled: bool, ranks: Any, arguments: Any, say: Any) -> None:
    from mirl.dataloaders.sources.paths import shown
    from mirl.engine.analysis.embedding import Parts, embed_parts
    from mirl.engine.training.plan import agree_on_main

    model, pool, function, about = _features(found, arguments, ranks.device)
    plan = about | {
        "data": source.fingerprint(), "images": source.num_images,
        "image_size": [model.config.image_height, model.config.image_width],
    }  # fmt: skip
    parts = Parts(arguments.out.with_name(arguments.out.name + ".parts"), source.num_images, plan)
    there = agree_on_main(ranks, parts.begin)
    ranks.barrier()
    if there:
        say(f"going on: {there} of {len(parts)} parts were made before, in {parts.folder}")
    missing = ranks.broadcast(parts.missing())
    left = sum(len(parts.numbers(part)) for part in missing)
    say(f"features of {left} images: {about['block']}, pool {pool}, {len(missing)} parts")
    broken = embed_parts(
        parts, missing, model, source, function, ranks=ranks, batch_size=arguments.batch_size,
        threads=arguments.threads, advance=lambda images: None,
    )  # fmt: skip
    for bad in [bad for of_rank in ranks.gather(broken) for bad in of_rank]:
        say(f"broken image {shown(bad.path)} ({bad.reason})")
    agree_on_main(ranks, lambda: _write(parts, source, labelled, plan, arguments, say))


def _features(found: Given, arguments: Any, device: Any) -> tuple[Any, str, Any, dict[str, Any]]:
    """Return the model, its pool, the function of a batch, and the values that tell one embedding from another."""
    from mirl.engine.analysis.features import HEAD, features, load_frozen_encoder
    from mirl.engine.transfer.classification.load import load_classifier

    if found.kind == CLASSIFIER:
        model, pool = load_classifier(found.checkpoint, weights=found.weights, device=device)[0], HEAD
    else:
        model, pool = load_frozen_encoder(found.checkpoint, device), arguments.pool or "avg"
    depth, block = model.config.depth, arguments.block
    if block is not None:
        pool = arguments.pool or "avg"
        if not -depth <= block < depth:
            raise UserError(f"block is {block}: the encoder has {depth} blocks, give 0 to {depth - 1}")
        block %= depth

    def function(images: Any) -> Any:
        return features(model, images, pool=pool) if block is None else model.features_after(images, block, pool)

    manifest = (found.checkpoint / "manifest.json").read_bytes()
    about = {
        "checkpoint": str(found.checkpoint), "checkpoint_sha256": hashlib.sha256(manifest).hexdigest(),
        "weights": found.weights if found.kind == CLASSIFIER else "last", "pool": pool,
        "block": "the last block, through the norm" if block is None else f"block {block} of {depth}, not normalised",
    }  # fmt: skip
    return model, pool, function, about


def _write(parts: Any, source: Any, labelled: bool, plan: Any, arguments: Any, say: Any) -> None:
    import numpy as np

    from mirl.engine.analysis.embedding_files import WRITERS, Table
    from mirl.engine.checkpoints.files import aside

    indices, width = [], 0
    for features_nD, index_n in parts.read():
        indices.append(index_n)
        width = max(width, features_nD.shape[1])
    index = np.concatenate(indices)
    if not len(index):
        raise UserError(f"every image of {arguments.data[0]} is broken: run mirl validate-data on it")
    labels = [source.label(int(number)) if labelled else -1 for number in index]
    table = Table(
        batches=lambda: (features_nD for features_nD, _ in parts.read()), width=width, index=index,
        labels=np.array(labels, dtype=np.int64), paths=[source.path(int(number)) for number in index],
        classes=list(source.classes or []) if labelled else [], about=plan,
    )  # fmt: skip
    if arguments.overwrite:
        arguments.out.unlink(missing_ok=True)
    with aside(arguments.out) as partial:
        WRITERS[arguments.out.suffix](table, partial)
    parts.remove()
    left_out = source.num_images - len(table)
    notes = [f"[{len(table)}, {width}] float32", "in the order of the data set", *(["with labels"] if labelled else [])]
    if left_out:
        notes.append(f"{left_out} broken image{'s' if left_out > 1 else ''} without a row")
    say(f"wrote {arguments.out}: features of {len(table)} images, {', '.join(notes)}")


def _parser() -> Parser:
    parser = Parser(
        prog="mirl embed",
        description="Features of every image of a data set under a frozen encoder, read as in training's evaluation: "
        "short side resized, centre crop. Stopped half-way, the same command goes on. Several ranks: torchrun "
        "--nproc-per-node N -m mirl.engine.cli embed ...",
    )
    add_checkpoint(parser, "a pre-trained model or a fine-tuned classifier")
    parser.add_argument(
        "--data", type=Path, nargs="+", required=True, metavar="DATA", help="folders, lists of paths, manifests, shards"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="FILE.npz, FILE.parquet (needs pyarrow), FILE.safetensors",
    )
    parser.add_argument("--split", choices=("train", "val"), default="train", help="of a folder that has both [train]")
    parser.add_argument("--index-dir", type=Path, metavar="DIR", help="the .idx files of tar shards [beside them]")
    parser.add_argument(
        "--block", type=int, metavar="N",
        help="features after block N, counted from 0, -1 the last, not normalised [the last, through the norm]",
    )  # fmt: skip
    parser.add_argument("--pool", choices=("avg", "token"), help="the mean of the patches, or the class token [avg]")
    add_device(parser)
    parser.add_argument("--batch-size", type=int, default=64, help="images of a forward pass [64]")
    parser.add_argument("--threads", type=int, default=4, help="threads that decode images [4]")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    return parser
