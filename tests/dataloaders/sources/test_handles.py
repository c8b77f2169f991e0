"""One budget of open files for the whole process, however many shards, sources and threads there are."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from mirl.dataloaders.sources.handles import HandlePool


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / f"{number}" for number in range(20)]
    for number, path in enumerate(paths):
        path.write_bytes(b"%d" % number)
    return [os.fspath(path) for path in paths]


def test_the_files_read_last_stay_open_and_no_more_than_the_budget(files):
    pool = HandlePool(budget=5)
    for path in files:
        with pool.lend(path) as handle:
            assert os.pread(handle, 9, 0) == os.path.basename(path).encode()
        assert len(pool) <= 5
    with pool.lend(files[-1]) as handle, pool.lend(files[-1]) as again:
        assert handle == again
        pool.drop(files[-1])  # closed by its last reader
        assert os.pread(handle, 9, 0) == b"19"
    with pytest.raises(OSError):
        os.fstat(handle)
    assert len(pool) == 4


def test_threads_share_the_budget_and_never_read_a_closed_file(files):
    pool, wrong = HandlePool(budget=3), []

    def work(first):
        for turn in range(300):
            path = files[(first * 7 + turn * 3) % len(files)]
            with pool.lend(path) as handle:
                if os.pread(handle, 9, 0) != os.path.basename(path).encode():
                    wrong.append(path)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(pool) <= 3


MANY = """
import io, resource, sys, tarfile
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), int(sys.argv[3])))
from mirl.dataloaders import open_source
from mirl.dataloaders.sources.tar_index import make_index
paths = []
for number in range(90):
    path = f"{sys.argv[1]}/{number}.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo(f"{number}.jpg"); info.size = 3; tar.addfile(info, io.BytesIO(b"jpg"))
    paths.append(path)
make_index(sys.argv[1], progress=False)
source = open_source(paths)
assert [source.read(i) for i in range(90)] == [b"jpg"] * 90
from mirl.dataloaders.sources.handles import POOL
print(len(POOL), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


@pytest.mark.process
@pytest.mark.parametrize(("soft", "hard", "opened"), [(60, 60, "15 60"), (60, 500, "90 500")])
def test_shards_named_one_by_one_beyond_the_limit_of_open_files(tmp_path, soft, hard, opened):
    command = [sys.executable, "-c", MANY, str(tmp_path), str(soft), str(hard)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == opened, done.stderr


FULL = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
from mirl.dataloaders.decoding.dali_pipeline import DaliDecoder
held = []
try:
    while True:
        held.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    pass
DaliDecoder(batch_size=1, image_size=(8, 8), channels=3, threads=1, device_id=None, depth=1)
"""


@pytest.mark.process
def test_dali_without_a_file_handle_left_is_not_called_missing():
    done = subprocess.run([sys.executable, "-c", FULL], capture_output=True, text=True, timeout=120)
    last = done.stderr.strip().splitlines()[-1]
    assert "UserError: the limit of open files is too low" in last and "pip install" not in last, done.stderr[-2000:]
