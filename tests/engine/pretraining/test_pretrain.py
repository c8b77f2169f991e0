"""Whole runs, started as a user starts them, on a small folder of real photographs."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from mirl.engine.checkpoints.reader import find_newest_good
from mirl.engine.cli import dispatch
from mirl.errors import UserError
from tests.support.launch import CHECKOUT, launch_environment
from tests.support.runs import ENTRY, TINY, equal_tensors, events, losses

# --- resuming


def stop_when(command: list[str], line: str, sign: signal.Signals, cwd: Path) -> tuple[int, str]:
    """Run ``command`` and send ``sign`` to every rank once ``line`` is printed: exit code and output."""
    process = subprocess.Popen(
        command, cwd=cwd, env=launch_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    seen = []
    for text in process.stdout:
        seen.append(text)
        if line in text:
            for worker in workers_of(process.pid):
                os.kill(worker, sign)
            line = "\0"  # once
    return process.wait(timeout=60), "".join(seen)


def workers_of(launcher: int) -> list[int]:
    """Processes below ``launcher`` that run a training script."""
    import psutil

    return [
        child.pid
        for child in psutil.Process(launcher).children(recursive=True)
        if f"{ENTRY}" in child.cmdline()
        and "--local_rank" in " ".join(child.cmdline())
        and "launch" not in " ".join(child.cmdline())
    ]


@pytest.mark.slow
def test_interrupted_and_resumed_is_the_uninterrupted_run_to_the_bit(tmp_path, photographs, server):
    common = [
        "deepspeed",
        "--num_accelerators",
        "2",
        ENTRY,
        "--data",
        str(photographs),
        *TINY,
        "--steps",
        "12",
        "--checkpoint-every",
        "4",
        "--ema",
        "0.9",
    ]
    flags = ["--data", photographs, "--steps", "12", "--checkpoint-every", "4", "--ema", "0.9"]
    whole = server.start(tmp_path, *flags, "--out", "whole")  # two ranks without a launcher
    assert whole.end() == [0, 0], whole.output()[-3000:]
    code, output = stop_when([*common, "--out", "cut"], "step  7/12", signal.SIGTERM, tmp_path)
    assert code == 75, output[-3000:]
    assert "SIGTERM came after step" in output
    assert "--resume auto goes on" in output
    reached = max(losses(tmp_path / "cut"))
    assert 7 <= reached < 12  # in the second epoch, not at its end
    resumed = server.start(tmp_path, *flags, "--out", "cut", "--resume", "auto")
    assert resumed.end() == [0, 0], resumed.output()[-3000:]
    assert f"resumed from cut/checkpoints/step-{reached:08d}" in resumed.output()
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert set(losses(tmp_path / "whole")) == set(range(1, 13))
    last = "checkpoints/step-00000012"
    assert equal_tensors(tmp_path / "whole" / last, tmp_path / "cut" / last)


def test_a_checkpoint_resumes_on_another_number_of_ranks_and_another_stage(tmp_path, photographs, server):
    base = ["--data", photographs, "--steps", "10", "--checkpoint-every", "4", "--out", "one"]
    one = server.start(tmp_path, *base, ranks=1)
    assert one.end() == [0], one.output()[-3000:]
    for step in ("step-00000008", "step-00000010"):
        subprocess.run(["rm", "-r", str(tmp_path / "one" / "checkpoints" / step)], check=True)
    expected = losses(tmp_path / "one")
    two = server.start(tmp_path, *base, "--resume", "auto", "--deepspeed_config", "zero3")
    assert two.end() == [0, 0], two.output()[-3000:]
    assert "the newest checkpoint is step-00000004" in two.output()
    # The batch is summed in two halves: fp32 in another order.
    assert losses(tmp_path / "one") == pytest.approx(expected, rel=1e-5)


def test_init_from_starts_a_new_run_from_the_weights(tmp_path, photographs, server):
    base = ["--data", photographs, "--warmup-steps", "1"]
    assert server.start(tmp_path, *base, "--steps", "6", "--out", "first", ranks=1).end() == [0]
    second = server.start(tmp_path, *base, "--steps", "2", "--out", "second", "--init-from", "first", ranks=1)
    assert second.end() == [0], second.output()[-3000:]
    assert "weights from first/checkpoints/step-00000006, everything else fresh" in second.output()
    assert losses(tmp_path / "second")[1] < losses(tmp_path / "first")[1]


# --- ways to start


@pytest.mark.slow
@pytest.mark.parametrize("way", ["deepspeed", "file", "module", "torchrun", "mirl"])
def test_every_way_to_start_trains(way, tmp_path, photographs, run):
    flags = ["--data", str(photographs), *TINY, "--steps", "2", "--out", str(tmp_path / "out")]
    command, cwd = {
        "deepspeed": (["deepspeed", "engine/pretrain.py", "--deepspeed_config", "ds_configs/zero2.json"], CHECKOUT),
        "file": ([sys.executable, ENTRY], tmp_path),
        "module": ([sys.executable, "-m", "mirl.engine.pretrain"], CHECKOUT),
        "torchrun": (["torchrun", "--standalone", "--nproc-per-node", "2", ENTRY], tmp_path),
        "mirl": ([sys.executable, "-m", "mirl.engine.cli", "pretrain"], CHECKOUT),
    }[way]
    result = run(*command, *flags, cwd=cwd)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert set(losses(tmp_path / "out")) == {1, 2}
    found, remarks = find_newest_good(tmp_path / "out" / "checkpoints")
    assert (found.name, remarks) == ("step-00000002", [])
    assert (tmp_path / "out" / "pictures" / "step-00000002.png").is_file()


def test_a_taken_port_is_no_error_on_one_machine(tmp_path, photographs, server):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = {"MASTER_PORT": str(other.getsockname()[1])}
        both = server.start(tmp_path, "--data", photographs, "--steps", "1", "--out", "out", environment=port)
        assert both.end() == [0, 0], both.output()[-3000:]


# --- bad input


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "nowhere"], "nowhere"),
        (["--data", "empty"], "empty"),
        (["--image-size", "33", "--patch-size", "8"], "image_height is 33 and patch_size is 8"),
        (["--batch-size", "1000", "--data", "PHOTOGRAPHS"], "44"),
        (["--deepspeed_config", "no.json", "--data", "PHOTOGRAPHS"], "deepspeed_config is 'no.json': no such file"),
        (["--deepspeed_config", "broken.json", "--data", "PHOTOGRAPHS"], "is not JSON"),
        (["--deepspeed_config", "batch.json", "--data", "PHOTOGRAPHS"], "train_batch_size 99 and batch_size is 8"),
        (["--micro-batch", "3", "--data", "PHOTOGRAPHS"], "micro_batch is 3"),
        (["--resume", "nowhere", "--data", "PHOTOGRAPHS"], "nowhere does not exist"),
        (["--model", "vit_q"], "invalid choice: 'vit_q'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, message, tmp_path, photographs, run, server):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "batch.json").write_text(json.dumps({"train_batch_size": 99, "zero_optimization": {"stage": 2}}))
    flags = [str(photographs) if flag == "PHOTOGRAPHS" else flag for flag in flags]
    if "nowhere" in flags[:2]:  # as a user starts it; the others meet the same handler of errors
        result = run(sys.executable, ENTRY, *TINY, "--steps", "1", "--out", "out", *flags)
        code, told = result.returncode, result.stderr
    else:
        started = server.start(tmp_path, "--steps", "1", "--out", "out", *flags, ranks=1)
        (code,), told = started.end(), started.output()
    assert code == 2, told
    errors = [line for line in told.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], told
    assert "Traceback" not in told
    assert not (tmp_path / "out").exists()


def test_another_architecture_and_a_taken_folder_are_refused_and_nothing_is_overwritten(tmp_path, photographs, server):
    out = tmp_path / "out"

    def start(*flags: str) -> tuple[int | None, str]:
        run = server.start(tmp_path, "--data", photographs, "--steps", "2", "--out", "out", *flags, ranks=1)
        return run.end()[0], run.output()

    code, told = start()
    assert code == 0, told[-3000:]
    before = {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    code, told = start("--resume", "auto", "--width", "64", "--steps", "4")
    assert code == 2 and "width is 64 and" in told, told
    assert "give --width 32 as before (width cannot change within a run)" in told
    code, told = start()
    assert code == 2 and "holds a run already" in told
    code, told = start("--resume", "auto")
    assert code == 2 and "is finished: 2 of 2 steps" in told
    code, told = start("--resume", "auto", "--steps", "4", "--batch-size", "4")
    assert code == 2 and "batch_size is 4" in told
    assert {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()} == before


def test_a_run_that_diverges_stops_on_all_ranks_and_keeps_its_checkpoint(tmp_path, photographs, server):
    base = ["--data", photographs, "--out", "out", "--checkpoint-every"]
    good = server.start(tmp_path, *base, "3", "--steps", "3")
    assert good.end() == [0, 0], good.output()[-3000:]
    more = ["100", "--resume", "auto", "--steps", "40", "--lr", "1e30", "--change", "lr", "--max-nonfinite-steps", "3"]
    bad = server.start(tmp_path, *base, *more)
    codes = bad.end(90)
    assert 0 not in codes and None not in codes, codes
    text = bad.output(0) + bad.output(1)
    assert "for 3 steps in a row" in text and "rank 1: loss of pair_1_4" in text and ".jpg" in text, text[-3000:]
    assert "Traceback" not in text
    skipped = events(tmp_path / "out", "skipped_step")
    assert [event["in_a_row"] for event in skipped][-3:] == [1, 2, 3]
    assert find_newest_good(tmp_path / "out" / "checkpoints")[0].name == "step-00000003"
    assert "Lower --base-lr" in text
    # As told: the rate of before, which is lower.
    lowered = server.start(tmp_path, *base, "3", "--resume", "auto", "--steps", "5")
    assert lowered.end() == [0, 0], lowered.output()[-3000:]
    assert max(losses(tmp_path / "out")) == 5


# --- what a run leaves


def test_visualize_makes_the_same_grid_from_a_checkpoint(tmp_path, photographs, run, server):
    assert server.start(tmp_path, "--data", photographs, "--steps", "2", "--out", "out", ranks=1).end() == [0]
    files = sorted(photographs.glob("*.jpg"))[:3]
    result = run(
        sys.executable,
        "-m",
        "mirl.engine.cli",
        "visualize",
        tmp_path / "out",
        *files,
        "--out",
        tmp_path / "grid.png",
        cwd=CHECKOUT,
    )
    assert result.returncode == 0, result.stderr
    assert "columns input, masked, main 1, residual 1, sum 1, main 2, residual 2, sum 2" in result.stdout
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width > 8 * 32 and grid.height > 3 * 32
    again = ["visualize", str(tmp_path / "out"), *map(str, files), "--out", str(tmp_path / "grid.png")]
    with pytest.raises(UserError, match="exists"):
        dispatch(again)
