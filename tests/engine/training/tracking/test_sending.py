"""A tracker may be slow, fail or hang at any time: the run goes on at its pace, and says what is missing."""

from __future__ import annotations

import ast
import importlib.util
import math
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

import mirl
from mirl.engine.configuration.config import TRACKERS, LogConfig
from mirl.engine.errors import Diverged, Preempted
from mirl.engine.training.run_log import RunLog
from mirl.engine.training.tracking import opening, sending
from mirl.engine.training.tracking.asked import require_installed
from mirl.engine.training.tracking.opening import KINDS, Trackers
from mirl.engine.training.tracking.sending import Sender
from mirl.errors import UserError
from tests.support.launch import CHECKOUT

FAST = {"tries": 3, "pauses": (0.001, 0.002)}


class Recorder:
    """Keeps what it is told. fails: errors to raise, one a call, None for a call that succeeds."""

    name = "recorder"

    def __init__(self, fails: list[BaseException | None] | None = None) -> None:
        self.calls: list[tuple] = []
        self.fails = fails or []
        self.abandoned = False
        self.go = threading.Event()
        self.go.set()

    def _called(self, *call: object) -> None:
        assert self.go.wait(30)
        if self.fails and (error := self.fails.pop(0)) is not None:
            raise error
        self.calls.append(call)

    def start(self) -> str:
        self._called("start")
        return "there"

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self._called("metrics", step, values)

    def picture(self, name: str, image: Image.Image, step: int) -> None:
        self._called("picture", name, step)

    def checkpoint(self, path: Path) -> None:
        self._called("checkpoint", path)

    def best(self, values: dict[str, float | str]) -> None:
        self._called("best", values)

    def finish(self, end: str) -> None:
        self._called("finish", end)

    def abandon(self) -> None:
        self.abandoned = True


def sent(sender: Sender, steps: range) -> None:
    for step in steps:
        sender.send(lambda tracker, step=step: tracker.metrics(step, {}))


def ended(sender: Sender, seconds: float = 10.0) -> list[str]:
    sender.close("finished")
    sender.wait(seconds)
    return list(sender.told)


def until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_an_outage_that_ends_loses_nothing_and_is_told_once():
    gone = ConnectionError("no\nserver")
    tracker = Recorder([None, None, gone, gone, None])
    sender = Sender(tracker, **FAST)
    sent(sender, range(4))
    until(lambda: len(tracker.calls) == 5)
    assert ended(sender) == [
        "tracker recorder: there",
        "tracker recorder: fails (ConnectionError: no server); training goes on",
        "tracker recorder: answers again",
    ]
    assert [call[1] for call in tracker.calls[1:-1]] == [0, 1, 2, 3] and tracker.calls[-1] == ("finish", "finished")
    assert not tracker.abandoned


def test_a_record_that_is_refused_again_and_again_is_left_out_and_counted():
    tracker = Recorder([None, *[ValueError("bad name")] * 3])
    sender = Sender(tracker, **FAST)
    sent(sender, range(3))
    until(lambda: len(tracker.calls) == 3)
    assert ended(sender)[-1] == "tracker recorder: 1 records are missing there"
    assert [call[1] for call in tracker.calls[1:-1]] == [1, 2]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SystemExit(3)])
def test_one_that_cannot_be_started_is_given_up(error):
    tracker = Recorder([error] * 3)
    sender = Sender(tracker, **FAST)
    until(lambda: tracker.abandoned)
    sent(sender, range(3))
    told = ended(sender)
    assert told[-1] == "tracker recorder: is given up" and type(error).__name__ in told[0]
    assert tracker.calls == []


def test_one_that_hangs_keeps_neither_the_run_nor_its_end():
    tracker = Recorder()
    tracker.go.clear()
    sender = Sender(tracker, **FAST)
    sent(sender, range(3))
    began = time.monotonic()
    told = ended(sender, 0.05)
    assert time.monotonic() - began < 5 and tracker.abandoned
    assert told == ["tracker recorder: did not close in time: 3 records and the end of the run may be missing there"]
    tracker.go.set()


def test_what_waits_is_bounded_and_pictures_more_tightly(monkeypatch):
    monkeypatch.setattr(sending, "MOST_WAITING", 5)
    monkeypatch.setattr(sending, "MOST_PICTURES", 2)
    tracker = Recorder()
    tracker.go.clear()
    trackers = Trackers([tracker])
    for step in range(3):
        trackers.picture(Image.new("RGB", (2, 2)), step, "grid")
    for step in range(4):
        trackers.metrics({"step": step, "loss": 0.5})
    tracker.go.set()
    trackers.close("finished")
    assert [call[:2] for call in tracker.calls[1:-1]] == [("picture", "grid")] * 2 + [("metrics", n) for n in range(3)]
    assert "tracker recorder: is too slow: records are left out" in (told := list(trackers.told()))
    assert told[-1] == "tracker recorder: 2 records are missing there"


def test_after_the_run_a_dead_server_is_not_asked_for_every_record():
    tracker = Recorder([None])
    sender = Sender(tracker, tries=10, pauses=(60.0, 60.0))
    until(lambda: tracker.calls)
    tracker.fails = [ConnectionError("gone")] * 100
    sent(sender, range(50))
    until(lambda: len(tracker.fails) < 100)  # it is in the pause after the first try
    told = ended(sender)
    assert told[-1] == "tracker recorder: was given up: 50 records and the end of the run are missing there"
    assert len(tracker.fails) == 100 - 2 - sending.TRIES_AT_THE_END


def test_after_the_run_a_refused_record_costs_that_record_alone():
    tracker = Recorder()
    tracker.go.clear()
    sender = Sender(tracker, **FAST)
    sent(sender, range(4))
    sender.close("finished")
    tracker.fails = [None, None, ValueError("bad name")]
    tracker.go.set()
    assert ended(sender)[-1] == "tracker recorder: 1 records are missing there"
    assert [call[1] for call in tracker.calls[1:]] == [0, 2, 3, "finished"]


@pytest.mark.parametrize(("error", "end"), [(None, "finished"), (Preempted("x"), "stopped"), (Diverged("x"), "failed")])
def test_what_the_log_hands_on_and_how_it_says_that_the_run_ended(error, end, tmp_path, monkeypatch):
    tracker = Recorder()
    log = RunLog(tmp_path, is_main=True)
    log.open(total_steps=5, start_step=0, tensorboard=False, trackers=Trackers([tracker]))
    log.metrics({"step": 3, "loss": 0.5, "left": None, "norm": math.nan, "images": 8}, None)
    log.picture(Image.new("RGB", (2, 2)), 3)
    log.event("checkpoint", 4, path="checkpoints/step-00000003", stall_ms=1.0)
    log.event("skipped_step", 4, detail="x")
    log.event("best", 3, score_percent=51.0)
    log.close_after(type(error) if error else None)
    assert tracker.calls == [
        ("start",),
        ("metrics", 3, {"loss": 0.5, "images": 8.0}),
        ("picture", "reconstructions", 3),
        ("checkpoint", Path("checkpoints/step-00000003")),
        ("best", {"step": 3, "score_percent": 51.0}),
        ("finish", end),
    ]
    assert "tracker recorder: there" in (tmp_path / "log.txt").read_text()


# --- asking for one


def test_one_that_is_not_installed_is_refused_before_anything_is_written(tmp_path, monkeypatch, photographs):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = mirl.recipe("tiny", data=str(photographs), out="run", steps=2, warmup_steps=1, track=("mlflow",))
    with pytest.raises(UserError, match=r"^track is mlflow, which is not installed: pip install 'mlflow-skinny>=3'$"):
        mirl.pretrain(config)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_a_tracker_wrote_is_not_taken_for_it(tmp_path, monkeypatch):
    (tmp_path / "mirl_tracker_of_nobody").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="is not installed"):
        monkeypatch.setitem(TRACKERS, "mirl_tracker_of_nobody", "x")
        require_installed(["mirl_tracker_of_nobody"])


def test_names_are_checked_where_no_flag_did():
    for names in (("wandb", "wandb"), ("comet",)):
        with pytest.raises(UserError, match=f"^track is {' '.join(names)}: give each of wandb, mlflow at most once"):
            LogConfig(track=names)
    assert set(KINDS) == set(TRACKERS)


def test_a_run_without_trackers_loads_none_of_them():
    folder = CHECKOUT / "engine" / "training" / "tracking"
    paths = sorted(folder.glob("*.py"))
    assert len(paths) > 5
    for path in paths:
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & set(opening.KINDS), path
