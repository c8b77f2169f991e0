"""DALI's graph for a GPU, defined where there is none: every operator and argument is known for its device."""

from __future__ import annotations

import pytest

from mirl.dataloaders.decoding import dali_pipeline
from mirl.dataloaders.decoding.dali_pipeline import DaliDecoder

nvidia_dali = pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install nvidia-dali-cuda130")


class Defined(Exception):
    """The graph stands; to build it would take a driver."""


@pytest.fixture
def graph(monkeypatch):
    """``graph(device_id, **settings)``: the outputs of the pipeline that a decoder would build."""

    def make(device_id: int | None, **settings):
        found = []

        def stop(pipe):
            raise Defined

        monkeypatch.setattr(nvidia_dali.Pipeline, "set_outputs", lambda pipe, *outputs: found.extend(outputs))
        monkeypatch.setattr(nvidia_dali.Pipeline, "build", stop)
        decoder = DaliDecoder.__new__(DaliDecoder)
        decoder.image_size, decoder.channels, decoder.device_id = (224, 192), settings.get("channels", 3), device_id
        decoder.finish, decoder.hw_decoder_load = device_id is not None, 0.65
        with pytest.raises(Defined):
            decoder._build(8, 2, 2)
        return found

    return make


@pytest.mark.parametrize("channels", [1, 3])
def test_the_graph_of_a_gpu_is_defined_and_ends_on_it(graph, channels):
    (images,) = graph(0, channels=channels)
    assert images.device == "gpu"


def test_the_graph_of_a_cpu_ends_there(graph):
    (windows,) = graph(None)
    assert windows.device == "cpu"


def test_an_argument_that_dali_does_not_know_is_refused_as_it_is_defined(graph, monkeypatch):
    monkeypatch.setitem(dali_pipeline._ON_GPU, "device_memory_pading", 1)
    with pytest.raises(Exception, match="device_memory_pading"):
        graph(0)


@pytest.mark.parametrize("name", sorted(dali_pipeline._ON_GPU) + ["hw_decoder_load"])
def test_every_hint_is_in_the_schema_of_the_decoder(name):
    from nvidia.dali import backend

    assert name in backend.GetSchema("decoders__ImageSlice").GetArgumentNames()
