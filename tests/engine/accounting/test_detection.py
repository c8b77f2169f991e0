"""FLOPs and memory of a detector by formula, against what torch counts and what a pass keeps."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mirl.engine.accounting.detection import DetectorShape, detector_flops, detector_image_bytes
from mirl.engine.models.config import model_config
from mirl.engine.transfer.detection.detector import Detector
from mirl.engine.transfer.encoder_model import encoder_config
from tests.engine.models.helpers import tiny_config

CLASSES, CHANNELS, REGIONS = 5, 16, 16


def parts(variant: str, window: int) -> tuple[Detector, DetectorShape]:
    torch.manual_seed(0)
    config = tiny_config(depth=6, width=48, heads=2, segments=2, patch_size=8, image_height=128, image_width=128)
    model = Detector(
        config, classes=CLASSES, variant=variant, window=window, regions=REGIONS, channels=CHANNELS, proposals=40
    )
    shape = DetectorShape(
        variant=variant, window=window, global_blocks=len(model.global_blocks), channels=CHANNELS, regions=REGIONS,
        classes=CLASSES,
    )  # fmt: skip
    return model, shape


def one_image() -> tuple:
    """With so many objects that a quarter of the regions has one."""
    images = torch.randint(0, 256, (1, 128, 128, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    corners = torch.tensor([[x, y] for x in (0.0, 40.0, 80.0) for y in (0.0, 40.0, 80.0)])
    masks = torch.zeros(9, 128, 128, dtype=torch.uint8)
    for number, (x, y) in enumerate(corners.int().tolist()):
        masks[number, y : y + 40, x : x + 40] = 1
    target = {"boxes": torch.cat([corners, corners + 40], dim=1), "labels": torch.ones(9, dtype=int), "masks": masks}
    return images, [(128, 128)], [target]


CASES = [("paper", 0), ("paper", 4), ("vitdet", 0), ("vitdet", 8)]


@pytest.mark.parametrize(("variant", "window"), CASES)
def test_the_formula_counts_what_torch_counts(variant, window):
    model, shape = parts(variant, window)
    model.resolve_attention(torch.device("cpu"))  # it multiplies a little to try
    with FlopCounterMode(display=False) as counter:
        model(*one_image())
    counted, formula = counter.get_flop_counts(), detector_flops(model.config, shape)

    def of(*names: str) -> int:
        return sum(sum(counted[f"Detector.{name}"].values()) for name in names)

    assert sum(counted["Detector.pyramid"].values()) == pytest.approx(formula.pyramid, rel=1e-6)
    assert of("rpn") == pytest.approx(formula.proposals, rel=1e-6)
    assert of("roi_heads") == pytest.approx(formula.regions, rel=1e-6)
    total = counter.get_total_flops()
    assert total - of("pyramid", "rpn", "roi_heads") == pytest.approx(formula.encoder, rel=1e-6)


@pytest.mark.parametrize(("variant", "window"), CASES)
def test_the_estimate_of_memory_is_near_what_a_pass_keeps(variant, window):
    model, shape = parts(variant, window)
    images = one_image()
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    alive = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: alive.append(x) or note(x), lambda x: x):
        model(*images)
    estimate = detector_image_bytes(model.config, shape, "fp32", math=True)
    # What the backward pass makes on its way is in the estimate too: it may be up to a half more, and never too little.
    assert 0.9 < estimate / sum(kept.values()) < 1.5, (estimate, sum(kept.values()))


def test_windows_of_16_save_what_the_notes_say():
    # Multiply-adds of 1024 x 1024 pixels: counted by hand for B: linear 348 G, attention 309 G; windows save 193 G.
    config = encoder_config(model_config("vit_b", image_height=1024, image_width=1024))
    shape = DetectorShape(variant="vitdet", window=16, global_blocks=4, channels=256, regions=512, classes=80)
    windowed = detector_flops(config, shape)
    everywhere = detector_flops(config, DetectorShape(**(vars(shape) | {"window": 0})))
    assert windowed.linear / 2e9 == pytest.approx(348, abs=1) and everywhere.attention / 2e9 == pytest.approx(
        309, abs=1
    )
    assert (windowed.linear + windowed.attention) / 2e9 == pytest.approx(464, abs=1)
