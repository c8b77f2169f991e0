"""A signal that comes while a process is about to say why it ends."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from mirl.engine.distributed.stop_request import SIGNALS, StopRequest
from mirl.engine.errors import EXIT_LOST_RANK, EXIT_PREEMPTED, LostRank
from tests.support.launch import CHECKOUT, launch_environment

PROGRAM = """
import os, signal, sys
from mirl.engine import errors
from mirl.engine.distributed.stop_request import StopRequest
def main():
    try:
        with StopRequest():
            raise getattr(errors, sys.argv[1])("the reason")
    finally:
        os.kill(os.getpid(), signal.SIGTERM)  # a launcher saw another rank fail, while this one closes its files
errors.run_entry_point(main)
"""


@pytest.mark.process
@pytest.mark.parametrize(("error", "code"), [("LostRank", EXIT_LOST_RANK), ("Preempted", EXIT_PREEMPTED)])
def test_a_command_tells_why_it_ends_and_keeps_its_exit_code(error, code):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, error], cwd=CHECKOUT, env=launch_environment(), capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == code and "the reason" in done.stderr, done.stderr


def test_elsewhere_signals_mean_after_an_error_what_they_meant_before():
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(LostRank), StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.reason == "SIGTERM came"
        raise LostRank
    assert [signal.getsignal(number) for number in SIGNALS] == before
