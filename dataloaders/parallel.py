"""Map a function over millions of items in threads, with a bar, in bounded memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
Result = TypeVar("Result")
Progress = bool | Callable[[int, int], None]


def default_workers() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parallel_map(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    total: int,
    workers: int,
    unit: str,
    progress: Progress = True,
) -> Iterator[Result]:
    """Give results in the order of the items. At most 16 items per worker are under way or waiting to be taken.

    progress: a bar on stderr, nothing, or a function of (done, total). Threads are enough for decoding, resizing and
    file access: Pillow, tifffile and the system calls release the interpreter lock.
    """
    waiting: deque = deque()
    done = 0
    with (
        ThreadPoolExecutor(workers, thread_name_prefix="mirl-map") as pool,
        tqdm(total=total, unit=unit, disable=progress is not True, smoothing=0.05) as bar,
    ):
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= 16 * workers:
                    yield waiting.popleft().result()
                    done = _advance(done, total, bar, progress)
            while waiting:
                yield waiting.popleft().result()
                done = _advance(done, total, bar, progress)
        finally:
            for future in waiting:
                future.cancel()


def _advance(done: int, total: int, bar: tqdm, progress: Progress) -> int:
    bar.update()
    if callable(progress):
        progress(done + 1, total)
    return done + 1
