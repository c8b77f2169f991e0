"""What stands above the kernels, on whatever device there is: the same bodies run on a CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mirl.dataloaders import build_train_loader
from mirl.engine.distributed import deepspeed_patches as patches
from mirl.engine.distributed.ds_engine import TrainEngine
from mirl.engine.models import Execution, ModelConfig
from mirl.engine.training.compiling import compile_regions
from mirl.engine.training.optimizer import build_optimizer
from tests.engine.models.helpers import assert_same, gradients, make_inputs, make_model, make_reference, tiny_config
from tests.support.runs import events, losses

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# DeepSpeed takes the GPU where there is one, for the whole process.
HERE = "cuda" if torch.cuda.is_available() else "cpu"
MODELS: dict[str, dict[str, Any]] = {
    "paper": {"segments": 4},
    "release": {"variant": "release", "segments": 4},
    "MAE": {"objective": "mae", "segments": 1, "did": False},
}
# Of loss and gradients, relative. float32 differs by the order of sums; bfloat16 has 8 bits, and the reference rounds
# its loss to them too.
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 5e-2}


def sizes(**overrides: Any) -> ModelConfig:
    """Widths and heads that every kernel and attention backend takes."""
    small = {"width": 64, "heads": 2, "decoder_width": 64, "decoder_heads": 2, "attention": "auto"}
    return tiny_config(**(small | overrides))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("device", DEVICES)
def test_the_model_is_the_reference(device: str, name: str, dtype: torch.dtype) -> None:
    model = make_model(sizes(**MODELS[name]), dtype=dtype).to(device)
    images, noise = (tensor.to(device) for tensor in make_inputs(model.config, 8))
    # In float32 whatever the model computes in, so that only the model rounds.
    reference = make_reference(model).to(device).float()
    expected = reference(images, noise)
    wanted = gradients(reference, expected.loss)
    output = model(images, noise=noise)
    assert torch.equal(output.mask.mask_BN, expected.mask_BN)
    found = gradients(model, output.loss)
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=TOLERANCE[dtype])
    if dtype == torch.float32:
        assert_same(found, wanted, TOLERANCE[dtype])
    whole = torch.cat([found[key].flatten().float() for key in wanted])
    reference_whole = torch.cat([value.flatten() for value in wanted.values()])
    assert (whole - reference_whole).norm() <= TOLERANCE[dtype] * reference_whole.norm()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_regions_are_eager(device: str, recompute: bool) -> None:
    """On a GPU by the code generator of the compiler; on a CPU, where that takes minutes, by all but that."""
    torch._dynamo.reset()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = make_model(sizes(segments=2), dtype=dtype).to(device)
    model.set_execution(Execution.for_device(torch.device(device), recompute=recompute))
    backend = "inductor" if device == "cuda" else "aot_eager_decomp_partition"
    choice = compile_regions(model, 8, torch.device(device), backend=backend)
    assert choice.on, choice.reason
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    backend, device = ("nccl", torch.device("cuda", 0)) if HERE == "cuda" else ("gloo", None)
    torch.distributed.init_process_group(
        backend, store=torch.distributed.HashStore(), rank=0, world_size=1, device_id=device
    )
    patches.forget_process_group_of_earlier_run()
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
            environment.setenv(name, value)
        environment.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)  # ZeRO 3 replaces it
        yield
    torch.distributed.destroy_process_group()


def trained(stage: int, *, flat: bool = True, accumulation: int = 1, bad_step: int | None = None) -> list[float]:
    """Losses of six steps of eight images; in ``bad_step`` one pixel's loss is not finite."""
    from mirl.engine.configuration.config import OptimConfig

    bf16 = HERE == "cuda"
    torch.manual_seed(0)
    config = sizes(segments=2)
    model = make_model(config, dtype=torch.float32).to(HERE)
    settings = {
        "train_batch_size": 8, "train_micro_batch_size_per_gpu": 8 // accumulation,
        "gradient_accumulation_steps": accumulation, "gradient_clipping": 1.0, "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False, "timers": {"throughput": {"enabled": False}},
    }  # fmt: skip
    optimizer = build_optimizer(model, OptimConfig(batch_size=8, steps=6, lr=1e-3), torch.device(HERE))
    engine = TrainEngine(model, optimizer, settings, flat_gradients=flat)
    images, noise = (tensor.to(HERE) for tensor in make_inputs(config, 8))
    found = []
    for number in range(6):
        step_losses, applied = [], None
        for part in zip(images.chunk(accumulation), noise.chunk(accumulation), strict=True):
            loss = engine.forward(part[0], noise=part[1]).loss
            engine.backward(loss * float("nan") if number == bad_step else loss)
            applied = engine.step(1e-3)
            step_losses.append(loss.item())
        assert applied is (number != bad_step)
        found.append(sum(step_losses) / accumulation)
    return found


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_way_through_the_engine_trains_alike(stage: int, group: None) -> None:
    plain = trained(stage)
    assert plain[-1] < 0.99 * plain[0]
    close = {"rel": 2e-2 if HERE == "cuda" else 1e-4}
    assert trained(stage, flat=False) == pytest.approx(plain, **close)
    assert trained(stage, accumulation=2) == pytest.approx(plain, **close)
    skipped = trained(stage, bad_step=2)
    assert skipped[:3] == pytest.approx(plain[:3], **close)
    assert skipped[3] == pytest.approx(skipped[2], **close), "the step that was skipped moved the weights"
    assert skipped[4] < skipped[3]


def batches(folder: Path, device_id: int | None, *, hold: int = 0) -> list[torch.Tensor]:
    """Images of twelve micro-batches, on the host; ``hold``: so many are kept on the device, which works meanwhile."""
    found: list[torch.Tensor] = []
    held: list[torch.Tensor] = []
    with build_train_loader(
        folder, image_size=(64, 64), micro_batch=4, seed=1, threads=2, device_id=device_id
    ) as loader:
        for _ in range(12):
            held.append(loader.next_micro_batch().images)
            work = torch.ones(512, 512, device=held[-1].device)
            for _ in range(8):
                work = work @ work / 512
            if len(held) > hold:
                found.append(held.pop(0).cpu())
            del work
        found += [images.cpu() for images in held]
    return found


@pytest.mark.parametrize("device", DEVICES)
def test_what_a_loader_gives_is_the_same_on_every_device_and_stays(device: str, photographs: Path) -> None:
    """nvJPEG rounds otherwise than libjpeg-turbo, by a level or two; a batch that was overwritten is off by tens."""
    device_id = 0 if device == "cuda" else None
    wanted = torch.stack(batches(photographs, None)).float()
    for hold in (0, 5):
        found = torch.stack(batches(photographs, device_id, hold=hold)).float()
        difference = (found - wanted).abs()
        assert difference.mean() < 1.0
        assert difference.flatten(2).mean(dim=2).max() < 3.0, "one of the images is another"


@pytest.mark.parametrize("device", DEVICES)
def test_a_run_is_resumed(device: str, server, photographs: Path, tmp_path: Path) -> None:
    """Twenty steps at once, and ten and ten; on a CPU to the bit."""
    precision = "bf16" if device == "cuda" else "fp32"
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    flags = ["--data", photographs, "--precision", precision, "--steps", "20", "--checkpoint-every", "10"]

    def pretrain(code: int, *more: str, **start: object) -> None:
        done = server.start(tmp_path, *flags, *more, ranks=1, environment=hidden, **start)
        assert done.end() == [code], done.output()[-2000:]

    pretrain(0, "--out", "whole")
    pretrain(75, "--out", "halves", inject={0: ["terminate_after_save", "10"]})
    pretrain(0, "--out", "halves", "--resume", "auto")
    assert events(tmp_path / "halves", "stopped")[0]["step"] == 10
    whole, halves = losses(tmp_path / "whole"), losses(tmp_path / "halves")
    assert set(whole) == set(halves) == set(range(1, 21))
    if device == "cpu":
        assert halves == whole
    else:
        assert halves == pytest.approx(whole, rel=2e-2)
    assert whole[20] < whole[1]
