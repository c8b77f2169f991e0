"""Fine-tuning is timm's own, step by step: same batches in, the same augmented batches, logits, losses, gradients of
every parameter, learning rates, weight decay, steps, average and curve out.

On timm's side everything is timm's: model, mixup and erasing, loss, optimiser with layer decay, clipping, average. On
ours it is the engine of a run. Only the head's first values are copied from ours. The encoder is an exported one.
"""

from __future__ import annotations

import pytest
import timm.data
import timm.loss
import timm.models
import timm.optim
import timm.scheduler
import timm.utils
import torch

from mirl.dataloaders import Batch
from mirl.engine.distributed import deepspeed_patches as patches
from mirl.engine.distributed.ds_engine import TrainEngine
from mirl.engine.models import MIRL
from mirl.engine.models.interop.timm_keys import timm_arguments, timm_state_dict
from mirl.engine.training.ema import ShardedEma
from mirl.engine.training.noise import seed_stochastic_depth
from mirl.engine.training.schedule import Schedule
from mirl.engine.transfer.classification.augmentation import BatchAugmentation, soft_cross_entropy
from mirl.engine.transfer.classification.classifier import HEAD_STD, Classifier, encoder_config
from mirl.engine.transfer.initialise_from import initialise_from
from mirl.engine.transfer.layer_decay import layer_decay_groups
from mirl.engine.transfer.random_state import BATCH_STREAM, keys_of, seeded
from tests.engine.models.helpers import tiny_config

STEPS, BATCH, CLASSES, SEED = 6, 8, 5, 3
LR, LAYER_DECAY, WEIGHT_DECAY, CLIP, DROP_PATH, EMA = 5e-3, 0.6, 0.3, 1.1, 0.4, 0.7
ERASE, MIXUP, CUTMIX, SMOOTHING = 0.5, 0.8, 1.0, 0.1
# Sums come out in another order (patches are projected by a matrix product here, by a convolution there), and AdamW
# takes a step of full size from a gradient near 0: so weights are compared against the length of their way, as a norm.
TOLERANCE = 1e-3
CASES = pytest.mark.parametrize(("pool", "positions"), [("avg", False), ("avg", True), ("token", False)])


@pytest.fixture(scope="module", autouse=True)
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    patches.forget_process_group_of_earlier_run()  # of another module of tests in this process
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
            environment.setenv(name, value)
        yield
    torch.distributed.destroy_process_group()


def pretrained() -> tuple:
    torch.manual_seed(SEED)
    model = MIRL(tiny_config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    prefix = "encoder."
    weights = {name.removeprefix(prefix): value for name, value in model.state_dict().items() if prefix in name}
    config = encoder_config(model.config, DROP_PATH, "math")
    return config, {name: value for name, value in weights.items() if not name.startswith("segment_norms")}


def make_ours(pool: str, positions: bool) -> Classifier:
    config, weights = pretrained()
    torch.manual_seed(SEED)
    options = {"num_classes": CLASSES, "pool": pool, "drop_path": DROP_PATH, "train_positions": positions}
    model = Classifier(config, **options)
    initialise_from(model, config, weights)
    return model.train()


def make_theirs(ours: Classifier, pool: str, positions: bool) -> timm.models.VisionTransformer:
    config, weights = pretrained()
    head = {name: value.detach().clone() for name, value in ours.named_parameters() if name.startswith(("head", "fc"))}
    arguments = timm_arguments(config, pool=pool, head=head)
    model = timm.models.VisionTransformer(**arguments, drop_path_rate=DROP_PATH)
    model.load_state_dict(timm_state_dict(weights, config, head=head))
    model.pos_embed.requires_grad_(positions)
    if positions:
        # timm also trains a position of the class token, which only adds to the token itself; here there is none.
        model.pos_embed.register_hook(lambda gradient: gradient * (torch.arange(gradient.shape[1]) > 0)[:, None])
    return model.train()


def batch(step: int) -> Batch:
    config = tiny_config()
    generator = torch.Generator().manual_seed(100 + step)
    shape = (BATCH, config.image_height, config.image_width, config.channels)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    positions = torch.arange(step * BATCH, (step + 1) * BATCH).numpy()
    return Batch(
        images=images, sample_ids=positions, epoch=0, positions=positions,
        labels=torch.randint(0, CLASSES, (BATCH,), generator=generator),
    )  # fmt: skip


class TimmAugmentation:
    """timm's transforms in the order of its loader and training script."""

    def __init__(self) -> None:
        self.mean = torch.tensor(timm.data.IMAGENET_DEFAULT_MEAN).view(3, 1, 1) * 255
        self.std = torch.tensor(timm.data.IMAGENET_DEFAULT_STD).view(3, 1, 1) * 255
        self.erase = timm.data.random_erasing.RandomErasing(ERASE, mode="pixel", device="cpu")
        self.mix = timm.data.Mixup(MIXUP, CUTMIX, label_smoothing=SMOOTHING, num_classes=CLASSES)

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        images = (batch.images.permute(0, 3, 1, 2).float() - self.mean) / self.std
        (key,) = keys_of(BATCH_STREAM, SEED, batch.epoch, batch.positions[:1])
        with seeded(key, torch.device("cpu")):
            return self.mix(self.erase(images), batch.labels)


def timm_name(name: str) -> str:
    return name.removeprefix("encoder.")


def by_name(groups: list[dict], model: torch.nn.Module, scaled: bool) -> dict[str, tuple[float, float]]:
    """(learning rate, weight decay) of each trainable parameter."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        timm_name(names[parameter]): (group["lr"] * (group["lr_scale"] if scaled else 1), group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }


@CASES
def test_learning_rates_and_weight_decay_of_every_parameter(pool, positions):
    ours = make_ours(pool, positions)
    theirs = make_theirs(ours, pool, positions)
    groups = layer_decay_groups(ours, weight_decay=WEIGHT_DECAY, decay=LAYER_DECAY)
    found = by_name([group | {"lr": LR} for group in groups], ours, scaled=True)
    wanted = by_name(timm_optimizer(theirs).param_groups, theirs, scaled=True)
    assert found.keys() == wanted.keys()
    for name, (rate, decay) in wanted.items():
        # timm counts the norm before the class token's head to the last block; MAE, whose rates these are, to the head.
        own = 1 / LAYER_DECAY if name.startswith("norm.") else 1
        assert found[name] == pytest.approx((rate * own, decay), rel=1e-12), name
    assert {decay for _, decay in found.values()} == {0.0, WEIGHT_DECAY}
    rates = {rate for rate, _ in found.values()}
    assert sorted(rates) == pytest.approx([LR * LAYER_DECAY**power for power in range(5, -1, -1)])


def timm_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return timm.optim.create_optimizer_v2(
        model, opt="adamw", lr=LR, weight_decay=WEIGHT_DECAY, layer_decay=LAYER_DECAY, betas=(0.9, 0.999), eps=1e-8
    )


def ds_config() -> dict:
    return {
        "train_micro_batch_size_per_gpu": BATCH, "gradient_clipping": CLIP, "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "bf16": {"enabled": False},
    }  # fmt: skip


@pytest.mark.parametrize("positions", [False, True])
def test_every_step_is_that_of_timm(positions):
    model = make_ours("avg", positions)
    theirs = make_theirs(model, "avg", positions)
    start = {timm_name(name): value.detach().clone() for name, value in model.named_parameters()}
    groups = layer_decay_groups(model, weight_decay=WEIGHT_DECAY, decay=LAYER_DECAY)
    engine = TrainEngine(model, torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.999), eps=1e-8), ds_config())
    average = ShardedEma(engine, EMA, updates=10**6)  # so many that the decay no longer rises
    their_average = timm.utils.ModelEmaV3(theirs, decay=EMA)
    augmentation = BatchAugmentation(
        num_classes=CLASSES, mean=model.config.mean, std=model.config.std, seed=SEED, micro_batch=BATCH,
        device=torch.device("cpu"), random_erase=ERASE, mixup=MIXUP, cutmix=CUTMIX, label_smoothing=SMOOTHING,
    )  # fmt: skip
    their_augmentation, their_loss = TimmAugmentation(), timm.loss.SoftTargetCrossEntropy()
    optimizer = timm_optimizer(theirs)
    first_rates = [group["lr"] for group in optimizer.param_groups]
    schedule = Schedule(peak_lr=LR, min_lr=1e-6, warmup_steps=2, total_steps=STEPS, shape="cosine")
    norms = []
    for step in range(STEPS):
        images, targets = augmentation(batch(step))
        seed_stochastic_depth(SEED, step, 0)
        logits = engine.forward(images)
        loss = soft_cross_entropy(logits, targets)
        engine.backward(loss)

        their_images, their_targets = their_augmentation(batch(step))
        seed_stochastic_depth(SEED, step, 0)
        their_logits = theirs(their_images)
        value = their_loss(their_logits, their_targets)
        optimizer.zero_grad()
        value.backward()

        assert torch.allclose(images, their_images, atol=1e-5) and torch.allclose(targets, their_targets, atol=1e-6)
        assert distance(logits, their_logits) < TOLERANCE
        assert loss.item() == pytest.approx(value.item(), rel=TOLERANCE)
        before = torch.stack([p.grad.norm() for p in theirs.parameters() if p.grad is not None]).norm().item()
        norms.append(before)
        timm.utils.dispatch_clip_grad(theirs.parameters(), CLIP)
        rate = schedule.lr(step)
        for group, first in zip(optimizer.param_groups, first_rates, strict=True):
            group["lr"] = rate * first / LR * group.get("lr_scale", 1.0)
        optimizer.step()
        their_average.update(theirs)
        assert engine.step(rate)
        average.update()
        assert engine.gradient_norm() == pytest.approx(before, rel=TOLERANCE)
    weights = {fragment.name: fragment.tensor for fragment in engine.fragments() if fragment.kind == "weight"}
    averages = {fragment.name: fragment.tensor for fragment in average.fragments()}
    for found, wanted in ((weights, theirs), (averages, their_average.module)):
        of_timm = dict(wanted.named_parameters())
        assert {timm_name(name) for name in found} == set(start)
        for name, tensor in found.items():
            first = start[timm_name(name)].flatten()
            assert distance(tensor - first, of_timm[timm_name(name)].detach().flatten() - first) < 0.02, name
    assert max(norms) > CLIP > min(norms), "clipping is not tried"


@CASES
def test_gradients_of_every_block(pool, positions):
    ours = make_ours(pool, positions).double()
    torch.nn.init.normal_(ours.head.weight)  # the head begins near zero, where it lets through hardly any gradient
    theirs = make_theirs(ours, pool, positions).double()
    images, targets = TimmAugmentation()(batch(0))
    found, wanted = {}, {}
    for model, gradients in ((ours, found), (theirs, wanted)):
        seed_stochastic_depth(SEED, 0, 0)
        soft_cross_entropy(model(images.double()), targets.double()).backward()
        gradients |= {timm_name(name): p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys() and sum("blocks." in name for name in found) == 4 * 12
    for name, gradient in wanted.items():
        assert distance(found[name].flatten(), gradient.flatten()) < 1e-6, name


def test_the_head_begins_as_in_mae():
    heads = [Classifier(tiny_config(width=384, heads=6), num_classes=1000).head for _ in range(2)]
    assert heads[0].weight.std().item() == pytest.approx(HEAD_STD, rel=0.15)
    assert not heads[0].bias.any()


@pytest.mark.parametrize("warmup", [0, 3])
def test_the_curve_is_timms_cosine_after_the_warm_up(warmup):
    total = 20
    ours = Schedule(peak_lr=LR, min_lr=1e-4, warmup_steps=warmup, total_steps=total, shape="cosine")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    theirs = timm.scheduler.CosineLRScheduler(
        optimizer, t_initial=total - warmup, lr_min=1e-4, warmup_t=warmup, warmup_prefix=True, t_in_epochs=False
    )
    for step in range(warmup, total):
        theirs.step_update(step)
        assert ours.lr(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
    # timm warms up from a rate of its own, here from the first step's share of the peak.
    assert [ours.lr(step) for step in range(warmup)] == pytest.approx([LR * (s + 1) / warmup for s in range(warmup)])


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference, relative to that of ``wanted``."""
    return ((found - wanted).norm() / wanted.norm().clamp_min(1e-12)).item()
