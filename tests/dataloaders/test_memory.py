"""Memory: none grows with the batches, and a million paths fit."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from mirl.dataloaders import build_train_loader

MIB = 2**20


@pytest.mark.slow
def test_host_memory_does_not_grow_over_2000_batches(jpeg_folder, photo, encoded):
    folder = jpeg_folder(60)
    # Slow paths too: files that Pillow decodes, and one that is broken in every epoch.
    (folder / "x.tif").write_bytes(encoded(photo(1), "TIFF"))
    (folder / "y.gif").write_bytes(encoded(photo(1), "GIF"))
    (folder / "000.jpg").write_bytes(b"")
    process = psutil.Process()
    with build_train_loader(folder, image_size=(32, 32), micro_batch=4, threads=2, bad_image_limit=1.0) as loader:
        for _ in range(400):  # allocators fill their pools
            loader.next_micro_batch()
        gc.collect()
        before = process.memory_info().rss
        for _ in range(2000):
            loader.next_micro_batch()
        gc.collect()
        grown = process.memory_info().rss - before
    assert loader.bad_encounters > 100 and len(loader.bad_images) == 1
    # A batch is 12 KiB, its decoded windows up to 150 KiB: keeping one in fifty would show.
    assert grown < 8 * MIB


def write_a_million_files(root: Path) -> None:
    """A thousand folders of a thousand files; each folder's are one file under many names, which is soon done."""
    for number in range(1000):
        folder = root / f"n{number:08d}"
        folder.mkdir()
        first = f"n{number:08d}_{number}.JPEG"
        (folder / first).write_bytes(b"\xff\xd8\xff")
        place = os.open(folder, os.O_RDONLY)
        for image in range(1000 + number, 1_000_000, 1000):
            os.link(first, f"n{number:08d}_{image}.JPEG", src_dir_fd=place, dst_dir_fd=place)
        os.close(place)


@pytest.mark.slow
def test_a_million_paths_start_in_20_s_and_1_gib(tmp_path):
    """Of a list and of a folder. The list asks whether each file is there."""
    listing, root = tmp_path / "million.txt", tmp_path / "images"
    root.mkdir()
    with open(listing, "w") as file:
        file.writelines(f"images/n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG\n" for i in range(1_000_000))
    code = (
        "import json, sys, time\n"
        "from pathlib import Path\n"
        "from mirl.dataloaders import build_train_loader\n"
        "from mirl.engine.accounting.free_memory import peak_host_memory\n"
        # On a busy machine a process stands ready without a core; the file system's time counts, that time does not.
        "def clock():\n"
        "    ready = Path('/proc/self/schedstat')\n"
        "    waited = int(ready.read_text().split()[1]) / 1e9 if ready.exists() else 0\n"
        "    return time.perf_counter() - waited\n"
        "base = peak_host_memory()\n"
        "begin = clock()\n"
        "loader = build_train_loader(sys.argv[1], image_size=(224, 224), micro_batch=64)\n"
        "ids = loader._order(0)\n"
        "took = clock() - begin\n"
        "peak = peak_host_memory()\n"
        "last = loader.paths([999_999])[0]\n"
        "print(json.dumps([loader.num_images, len(ids), took, base / 2**30, peak / 2**30, last]))\n"
        "loader.close()\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    try:
        write_a_million_files(root)
        for data in (listing, root):
            done = subprocess.run(
                [sys.executable, "-c", code, data], capture_output=True, text=True, timeout=240, env=environment
            )
            assert done.returncode == 0, done.stderr
            images, order, seconds, base_gib, peak_gib, last = json.loads(done.stdout)
            assert images == order == 1_000_000
            assert last.endswith("n00000999/n00000999_999999.JPEG")
            assert seconds < 20, data
            assert peak_gib - base_gib < 1, data  # on top of what importing torch takes
    finally:
        shutil.rmtree(root)  # pytest would keep the files of three runs
