"""A step on fake tensors: nothing leaves the device, nothing waits for it, every gradient is there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mirl.engine.accounting.fake_step import fake_step
from mirl.engine.models import MIRL, ExactSkips
from mirl.engine.transfer.classification.classifier import Classifier
from tests.dry_run.cases import BATCH, MODELS, step_of
from tests.engine.models.helpers import tiny_config

# Masks are made on the host, and uploaded once.
UPLOADED = ["rand", "_to_copy"]
VARIANTS = {
    "paper": {},
    "release": {"variant": "release"},
    "MAE": {"objective": "mae", "segments": 1, "did": False},
    "several decoders": {"objective": "multi_decoder"},
    "coarse to fine": {"objective": "coarse_to_fine"},
    "features": {"feature_loss": 1.0},
    "stochastic depth": {"drop_path": 0.2},
}


@pytest.mark.parametrize("name", ["vit_b, release", "vit_b_48, two blocks a segment"])
def test_the_forward_pass_stays_on_the_gpu(name):
    step = fake_step(lambda: MIRL(MODELS[name]()), BATCH, device="cuda")
    assert step.off_device == UPLOADED and step.waits == []
    assert not step.large_fp32


@pytest.mark.parametrize("name", MODELS)
def test_every_gradient_is_complete_and_no_activation_is_float32(name):
    step = step_of(name)
    assert len(step.gradients) == len(step.parameters) and not any(step.gradients.values())
    assert step.waits == [] and not step.large_fp32


@pytest.mark.parametrize("name", VARIANTS)
def test_every_objective_stays_on_the_gpu_and_has_its_gradients(name):
    config = tiny_config(patch_size=8, image_height=32, image_width=32, **VARIANTS[name])
    forward = fake_step(lambda: MIRL(config), 4, device="cuda")
    noises = 2 if config.feature_loss else 1
    assert sorted(forward.off_device) == sorted(["rand", *["randn"] * (noises - 1), *["_to_copy"] * noises])
    step = fake_step(lambda: MIRL(config), 4)
    assert step.gradients and not any(step.gradients.values()) and step.waits == forward.waits == []


def test_a_classifier_is_listed_too():
    step = fake_step(lambda: Classifier(tiny_config(), num_classes=10), 4)
    assert not any(step.gradients.values()) and step.flops > 0


class Waiting(MIRL):
    """Asks the device for a number in every pass."""

    def forward(self, images, **kwargs):
        output = super().forward(images, **kwargs)
        return output._replace(loss=output.loss * float(output.loss.detach()))


class Leaving(MIRL):
    """Sends the loss through the host."""

    def forward(self, images, **kwargs):
        output = super().forward(images, **kwargs)
        return output._replace(loss=output.loss.cpu().to(images.device))


class Idle(MIRL):
    """Has a weight that takes no part."""

    def __init__(self, config):
        super().__init__(config)
        self.idle = nn.Parameter(torch.zeros(3))


def test_faults_are_seen():
    config = tiny_config()
    with pytest.raises(Exception, match="_local_scalar_dense"):
        fake_step(lambda: Waiting(config), 4, device="cuda")
    assert fake_step(lambda: Leaving(config), 4, device="cuda").off_device == [*UPLOADED, "_to_copy", "_to_copy"]
    step = fake_step(lambda: Idle(config), 4)
    assert {name: fault for name, fault in step.gradients.items() if fault} == {"idle": "no gradient"}


def test_what_the_skips_leave_out_is_not_listed():
    config = tiny_config()
    plain = ExactSkips(masked_only_tail=False, kv_prefix=False, mask_token_table=False)
    assert fake_step(lambda: MIRL(config, plain), 4).flops > 1.1 * fake_step(lambda: MIRL(config), 4).flops
