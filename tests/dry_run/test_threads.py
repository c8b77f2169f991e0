"""Threads of ours that touch a GPU set their device before anything else: a thread starts on GPU 0."""

from __future__ import annotations

import threading

import pytest
import torch

from mirl.dataloaders.stream import BatchStream
from mirl.engine.training import noise


@pytest.fixture
def cuda_calls(monkeypatch) -> list[tuple[str, object, str]]:
    """What was called of CUDA: name, device, thread. Streams and pinning are stand-ins, which do nothing."""
    calls: list[tuple[str, object, str]] = []

    def note(name: str, result=None):
        def call(*arguments, **_):
            calls.append((name, arguments[0] if arguments else None, threading.current_thread().name))
            return result

        return call

    monkeypatch.setattr(torch.cuda, "set_device", note("set_device"))
    monkeypatch.setattr(torch.cuda, "Stream", note("Stream"))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: note("pin_memory", tensor)(None))
    return calls


def test_the_loader_sets_its_device_before_it_makes_a_batch(cuda_calls):
    device, seen = torch.device("cuda", 3), []

    def plans():
        seen.append(list(cuda_calls))
        yield from ()

    stream = BatchStream(plans(), None, None, None, object(), device=device, prefetch=1)
    assert list(stream) == []
    stream.close()
    (before,) = seen
    assert before == [("Stream", device, "MainThread"), ("set_device", device, "mirl-data")]


def test_a_loader_on_the_cpu_asks_cuda_for_nothing(cuda_calls):
    stream = BatchStream(iter(()), None, None, None, object(), device=torch.device("cpu"), prefetch=1)
    assert list(stream) == [] and cuda_calls == []
    stream.close()


def test_the_thread_that_makes_noise_sets_its_device_before_it_pins(cuda_calls, monkeypatch):
    device = torch.device("cuda", 3)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_, **__: tensor)
    ahead = noise.NoiseAhead(0, 4, device)
    ahead.take(0, 0, 2)
    ahead.take(1, 0, 2)  # made by the thread
    of_thread = [call for call in cuda_calls if call[2] != "MainThread"]
    assert [call[0] for call in of_thread[:2]] == ["set_device", "pin_memory"] and of_thread[0][1] == device
