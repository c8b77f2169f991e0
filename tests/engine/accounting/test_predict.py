"""Devices, the roofline, and what follows from it for a run."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from mirl.engine.accounting.devices import DEVICES, device_named, device_reported
from mirl.engine.accounting.fake_step import FLASH, OWN, fake_step, optimiser_operators
from mirl.engine.accounting.forecast import forecast_step
from mirl.engine.accounting.operators import OWN_ATTENTION, Operator
from mirl.engine.accounting.predict import COPY_SHARE, GEMM_SHARE, HOST_S, LAUNCH_S, LEAST_S, seconds, times
from mirl.engine.accounting.traffic import Links, link_seconds, sent_bytes, shown_seconds
from mirl.engine.distributed import flat_gradients
from mirl.engine.models import MIRL
from mirl.errors import UserError
from tests.engine.models.helpers import tiny_config

H100 = device_named("H100")
REPORTED = {
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H100 PCIe": "H100-PCIe",
    "NVIDIA H100 NVL": "H100-NVL",
    "NVIDIA H200": "H200",
    "NVIDIA B200": "B200",
    "NVIDIA A100-SXM4-80GB": "A100",
    "NVIDIA A100-SXM4-40GB": "A100-40",
    "NVIDIA A100-PCIE-40GB": "A100-40",
    "NVIDIA A100 80GB PCIe": "A100",
    "NVIDIA L4": "L4",
    "NVIDIA L40": "L40",
    "NVIDIA L40S": "L40S",
    "NVIDIA A10": "A10",
    "NVIDIA GeForce RTX 4090": "4090",
    "NVIDIA RTX A6000": "A6000",
    # Names that contain one of another device.
    "NVIDIA RTX A4000": None,
    "NVIDIA A10G": None,
    "NVIDIA GeForce RTX 4090 Laptop GPU": None,
    "NVIDIA GeForce RTX 3090 Ti": None,
    "Tesla V100-SXM2-16GB": None,
}


@pytest.mark.parametrize("name", REPORTED)
def test_a_device_is_known_by_the_name_that_torch_gives_it(name):
    found = device_reported(name)
    assert (found.key if found else None) == REPORTED[name]


def test_our_attention_takes_as_long_as_its_bytes_or_its_instructions():
    shape = (256, 12, 50, 50, 64)
    own = Operator("short_attention", "forward", "attention", 1, 4 * 256 * 50 * 768 * 2, 0.0, shape)
    assert seconds(own, H100) == pytest.approx(LAUNCH_S + own.bytes / (COPY_SHARE * H100.bandwidth))
    # One row more is another tile both ways, with four times the instructions for the same bytes.
    long = replace(own, name="decoder_attention", shape=(256, 16, 65, 65, 32))
    short = replace(long, shape=(256, 16, 64, 64, 32), bytes=0.0)
    assert seconds(long, H100) - LAUNCH_S == pytest.approx(4 * (seconds(short, H100) - LAUNCH_S))
    # A step of the model has an operator for each, of the FLOPs that attention has without ours.
    model = tiny_config(width=64, heads=2, decoder_width=64, decoder_heads=2)
    steps = [fake_step(lambda: MIRL(model), 4, attention=attention) for attention in (FLASH, OWN)]
    names = {operator.name for operator in steps[1].operators if operator.kind == "attention"}
    assert names == set(OWN_ATTENTION) and steps[0].flops == steps[1].flops
    shapes = [{o.shape for o in step.operators if o.kind == "attention"} for step in steps]
    assert shapes[0] == shapes[1]


def test_a_device_is_known_by_what_a_user_calls_it():
    for name in ("4090", "RTX 4090", "rtx4090"):
        assert device_named(name).key == "4090"
    assert device_named("h100-pcie") is DEVICES["H100-PCIe"] is device_named("H100 PCIe")
    with pytest.raises(UserError, match="gpu is V100: choose one of .*H100"):
        device_named("V100")


def test_every_device_names_the_source_of_its_figures():
    for device in DEVICES.values():
        assert device.source and device.peak_flops > device.bandwidth > device.link > 1e9


def test_a_copy_takes_its_bytes_and_a_small_one_a_launch():
    copy = Operator("clone", "forward", "copies", 1, 1e9, 0.0)
    assert seconds(copy, H100) == pytest.approx(1e9 / (COPY_SHARE * H100.bandwidth), rel=0.01)
    assert seconds(replace(copy, bytes=100.0), H100) == LEAST_S
    two = replace(copy, bytes=100.0, launches=2)
    assert seconds(two, H100) == 2 * LEAST_S


def test_a_large_product_reaches_its_share_of_the_peak_and_a_ragged_one_less():
    def reached(rows: int, columns: int, inner: int) -> float:
        flops = 2.0 * rows * columns * inner
        moved = 2.0 * (rows * inner + inner * columns + rows * columns)
        product = Operator("mm", "forward", "gemm", 1, moved, flops, (rows, columns, inner))
        return flops / seconds(product, H100) / H100.peak_flops

    # 66 x 64 tiles of 128 x 256 are exactly 32 waves of 132 multiprocessors.
    assert reached(66 * 128, 64 * 256, 8192) == pytest.approx(GEMM_SHARE, rel=0.02)
    # One tile more in each direction begins another wave, which is nearly empty.
    assert reached(12 * 128 + 1, 11 * 256 + 1, 8192) < 0.75 * reached(12 * 128, 11 * 256, 8192)
    # A product of one row is bound by its bytes.
    assert reached(1, 4096, 4096) < 0.01


def test_short_sequences_fill_the_tiles_of_attention_badly():
    def time(queries: int) -> float:
        moved = 2.0 * 4 * 256 * 12 * queries * 64
        shape = (256, 12, queries, queries, 64)
        return seconds(Operator("flash", "forward", "attention", 1, moved, 0.0, shape), H100)

    assert time(64) == pytest.approx(time(128), rel=0.35)  # the same tiles, half of their rows unused
    assert time(256) > 2 * time(128)


def test_a_step_is_bound_by_the_longer_of_device_and_host():
    small = Operator("add", "forward", "elementwise", 1, 100.0, 0.0)
    large = replace(small, bytes=1e9)
    many = times(Counter({small: 1000}), H100, step=Counter())
    assert many.compute_s == many.host_s == pytest.approx(1000 * HOST_S)
    few = times(Counter({large: 10}), H100, accumulation=3, step=Counter({small: 1}))
    assert few.compute_s == few.device_s and few.launches == 31 and few.bytes == pytest.approx(30e9 + 100)
    assert sum(few.shares.values()) == pytest.approx(1)


def test_the_optimiser_moves_the_bytes_of_its_table():
    parameters = [10**6] * 100
    for ranks, accumulation, expected in ((1, 1, 4 + 6 + 4 + 28 + 6), (8, 1, 4 + 44 / 8), (1, 4, 4 * 10 + 44)):
        found = optimiser_operators(parameters, ranks, accumulation=accumulation)
        assert sum(count * operator.bytes for operator, count in found.items()) == pytest.approx(expected * 1e8)
    # In one pass the gradient is read twice, as it is; fp32 state is read and written once, the weight written.
    for ranks, accumulation, expected in ((1, 1, 4 + 2 + 28), (8, 1, 4 + 30 / 8), (1, 4, 4 * 10 + 4 + 4 + 26)):
        found = optimiser_operators(parameters, ranks, accumulation=accumulation, one_pass=True)
        assert sum(count * operator.bytes for operator, count in found.items()) == pytest.approx(expected * 1e8)


def test_copies_of_gradients_are_counted_as_they_are_made(monkeypatch):
    monkeypatch.setattr(flat_gradients, "COPIED_TOGETHER", 10)
    monkeypatch.setattr(flat_gradients, "COPIED_TOGETHER_ON_GPU", 100)
    # From the last parameter on: 4 + 7, 10, 3 + 1 + 1.
    assert flat_gradients.copies_of_gradients([1, 1, 3, 10, 7, 4], on_gpu=False) == 3
    assert flat_gradients.copies_of_gradients([1, 1, 3, 10, 7, 4], on_gpu=True) == 1
    assert flat_gradients.copies_of_gradients([], on_gpu=False) == 0


def test_traffic_hides_behind_computation_and_never_behind_more():
    links = Links(hidden=0.7)
    assert shown_seconds(1.0, 10.0, links) == pytest.approx(0.3)
    assert shown_seconds(1.0, 0.1, links) == pytest.approx(0.9)
    assert sent_bytes(10**9, 2, 1, 1) == link_seconds(10**9, 2, 1, 1, links) == 0
    assert sent_bytes(8, 2, 2, 1) == 16 and sent_bytes(8, 2, 2, 2) == 24 and sent_bytes(8, 3, 2, 2) == 48


def test_more_gpus_take_as_many_images_more_and_faster_memory_less_time():
    def step(gpu: str, gpus: int, micro_batch: int = 512):
        return forecast_step(lambda: MIRL(tiny_config()), device_named(gpu), gpus=gpus, micro_batch=micro_batch)

    one, eight = step("H100", 1), step("H100", 8)
    assert eight.images == 8 * one.images and one.shown_link_s == 0 < eight.shown_link_s
    assert 4 * one.images_per_s < eight.images_per_s < 8.5 * one.images_per_s
    assert step("4090", 1).times.device_s > one.times.device_s > 0
