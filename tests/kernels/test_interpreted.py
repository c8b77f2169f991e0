"""Runs the files of this folder again with TRITON_INTERPRET=1, so that plain `pytest` covers the Triton kernels too.

Triton looks at the variable when a kernel is decorated, hence another process. Its results come back as JUnit XML; each
file is a test here, which fails with the other process's own failures.
"""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from mirl.kernels.triton_import import HAS_TRITON, INTERPRETED
from tests.support.launch import CHECKOUT

HERE = Path(__file__).resolve().parent
# The fewest tests that must have passed in a file: a run that collects nothing is not a success.
FILES = {
    "test_gather_patches": 20,
    "test_gather_tokens": 25,
    "test_scatter_tokens": 50,
    "test_masked_residual_mse": 40,
    "test_residual_layer_norm": 30,
    "test_bias_gelu": 20,
    "test_flat_adamw": 30,
    "test_own_attention": 36,
    "test_registered_ops": 24,
    "test_dispatch": 3,
}

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="this is the interpreted process"),
    pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed: pip install triton"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> tuple[dict[str, list[ElementTree.Element]], str]:
    report = tmp_path_factory.mktemp("interpreted") / "report.xml"
    command = [sys.executable, "-m", "pytest", *(str(HERE / f"{name}.py") for name in FILES)]
    command += ["-q", "-p", "no:cacheprovider", "-m", "not gpu", f"--junitxml={report}"]
    # A GPU, if any, stays out of it: CPU tensors are interpreted.
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    output = done.stdout[-8000:] + done.stderr[-2000:]
    assert report.exists(), output
    by_file: dict[str, list[ElementTree.Element]] = {name: [] for name in FILES}
    for case in ElementTree.parse(report).iter("testcase"):
        by_file[case.get("classname", "").rpartition(".")[2]].append(case)
    return by_file, output


@pytest.mark.parametrize("name", FILES)
def test_interpreted(name, results, record_property):
    by_file, output = results
    failed = [case.get("name") for case in by_file[name] if {child.tag for child in case} & {"failure", "error"}]
    passed = [case for case in by_file[name] if not {child.tag for child in case} & {"failure", "error", "skipped"}]
    record_property("interpreted_tests_passed", len(passed))
    assert not failed, f"interpreted {name}: {len(failed)} failed, {len(passed)} passed: {failed[:10]}\n{output}"
    assert len(passed) >= FILES[name], f"only {len(passed)} tests of {name} ran interpreted\n{output}"
