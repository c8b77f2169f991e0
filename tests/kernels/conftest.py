"""Outputs are NaN before a kernel runs, so that an element it forgets cannot pass; debug checks end with each test."""

import pytest
import torch

from mirl import kernels


@pytest.fixture(autouse=True)
def nan_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    def filled(allocate):
        def allocate_filled(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() and type(tensor) is torch.Tensor else tensor

        return allocate_filled

    monkeypatch.setattr(torch, "empty", filled(torch.empty))
    monkeypatch.setattr(torch, "empty_like", filled(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", filled(torch.Tensor.new_empty))


@pytest.fixture(autouse=True)
def debug_off():
    yield
    kernels.set_debug(False)
