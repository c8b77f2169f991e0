"""Make the composites of the demo of segmentation, as a data set that `mirl segment` reads."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from mirl.dataloaders.tools.composite_sets import write_labels
from mirl.dataloaders.tools.composites import STUFF, Composer
from mirl.dataloaders.tools.demo import default_cache_dir
from mirl.disk import set_mode
from mirl.errors import UserError


def prepare_label_composites(
    cache_dir: str | Path | None = None, *, train: int = 1200, val: int = 100, side: int = 128
) -> Path:
    """Return the folder of composites with label images: images/ and annotations/, both with train/ and val/.

    label-map.txt lies beside them. Each photograph is a class, and all objects together are one class: telling ten
    kinds apart takes longer than a demo. The folder is made once and published by one rename. Any number of processes
    may call this at once. UserError if the folder cannot be written.
    """
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    composer = Composer(size=(side, side), objects=(2, 4), share=(0.3, 0.55))
    kind = "fashion" if composer.fashion else "glyphs"
    target = cache / f"label-composites-{side}px-{kind}-{train}-{val}-v2"
    if target.is_dir():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=cache, prefix=".composites-"))
    except OSError as error:
        raise UserError(
            f"demo cache folder {cache} cannot be written ({error.strerror}); set MIRL_CACHE to one that can"
        ) from None
    try:
        for split, count in (("train", train), ("val", val)):
            write_labels(work, split, count, composer)
        meant = [*STUFF, *("object" for _ in composer.names)]
        names = ["0 ignore", *(f"{value} {name}" for value, name in enumerate(meant, 1))]
        (work / "label-map.txt").write_text("\n".join(names) + "\n")
        set_mode(work, 0o755)
        work.rename(target)
    except OSError:
        if not target.is_dir():  # otherwise another process was first
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target
