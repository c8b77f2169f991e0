"""What importing the package costs and needs."""

from __future__ import annotations

import subprocess
import sys


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


def test_without_dali_the_package_imports_and_the_loader_names_the_command(jpeg_folder):
    code = (
        "import sys\n"
        "sys.modules['nvidia.dali'] = None\n"  # as if it were not installed
        "import mirl.dataloaders\n"
        "print(mirl.dataloaders.open_source(sys.argv[1]).num_images)\n"
        "mirl.dataloaders.build_train_loader(sys.argv[1], image_size=(32, 32), micro_batch=4)\n"
    )
    done = run(code, jpeg_folder(8))
    assert done.stdout == "8\n"
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("mirl.errors.UserError: NVIDIA DALI cannot be imported")
    assert "pip install nvidia-dali-cuda130" in last


def test_a_process_that_forgets_to_close_still_ends(jpeg_folder):
    code = (
        "import sys\n"
        "from mirl.dataloaders import build_train_loader\n"
        "loader = build_train_loader(sys.argv[1], image_size=(32, 32), micro_batch=4, threads=2)\n"
        "loader.next_micro_batch()\n"
        "print('done')\n"
    )
    done = run(code, jpeg_folder(8))
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
