"""The engine is imported on a host with a GPU and no CUDA toolkit: nothing is looked for, nothing is compiled."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support.launch import CHECKOUT, launch_environment

# CUDA is said to be there before DeepSpeed is imported; whoever wants nvcc, or starts a process, is told.
SCRIPT = """
import json, os, subprocess, sys, types
import torch
properties = types.SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132,
                                   total_memory=85 * 10**9, gcnArchName="")
cuda = torch.cuda
cuda.is_available = cuda.is_initialized = lambda: True
cuda.device_count, cuda.current_device = (lambda: 1), (lambda: 0)
cuda.get_device_properties = lambda *a, **k: properties
cuda.get_device_capability = lambda *a, **k: (9, 0)
cuda.get_device_name = lambda *a, **k: properties.name
cuda._lazy_init = cuda.synchronize = lambda *a, **k: None
import torch.utils.cpp_extension as extension
extension.CUDA_HOME = None
compiled = []
extension.load = extension.load_inline = lambda *a, **k: compiled.append(a)
started = []
popen = subprocess.Popen.__init__
def note(self, args, *a, **k):
    started.append(args if isinstance(args, str) else " ".join(map(str, args)))
    return popen(self, args, *a, **k)
subprocess.Popen.__init__ = note
import mirl.engine.distributed.ds_engine
from deepspeed.accelerator import get_accelerator
print(json.dumps({"accelerator": get_accelerator()._name, "compiled": len(compiled),
                  "nvcc": [line for line in started if "nvcc" in line]}))
"""


@pytest.mark.process
def test_a_gpu_without_a_toolkit_is_enough():
    environment = {key: value for key, value in launch_environment().items() if not key.startswith(("CUDA", "DS_"))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"accelerator": "cuda", "compiled": 0, "nvcc": []}
