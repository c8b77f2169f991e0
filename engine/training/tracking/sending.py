"""A tracker in a thread of its own, behind a queue with a bound: whatever becomes of it, the run keeps its pace."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from mirl.engine.training.tracking.tracker import Tracker

MOST_WAITING = 2000  # records; at one a minute more than a day
MOST_PICTURES = 8  # of those that wait, because each holds some megabytes
TRIES = 10
TRIES_AT_THE_END = 3  # records in a row that fail, after which the rest is left out
PAUSES = (1.0, 30.0)  # seconds before the second try and at most; the ten tries take three minutes

Call = Callable[[Tracker], object]


class Sender:
    """Sends what a run records to ``tracker``, in order. No method waits for it but `close`, and that not for long.

    A call that fails is made again, with pauses; what then still fails is left out. A tracker that cannot be started is
    given up. `told` collects lines for the log.
    """

    def __init__(self, tracker: Tracker, *, tries: int = TRIES, pauses: tuple[float, float] = PAUSES) -> None:
        self.name = tracker.name
        self.told: deque[str] = deque()
        self._tracker, self._tries, self._pauses = tracker, tries, pauses
        self._waiting: deque[tuple[Call, bool]] = deque()
        self._pictures = 0  # among those that wait
        self._changed = threading.Condition()
        self._end: str | None = None
        self._given_up = False
        self._failing = False
        self._lost = 0
        self._full_told = False
        self._thread = threading.Thread(target=self._work, name=f"tracker {self.name}", daemon=True)
        self._thread.start()

    def send(self, call: Call, *, picture: bool = False) -> None:
        """Have ``call`` made when its turn comes; it is left out where too much waits already."""
        with self._changed:
            if self._given_up or self._end is not None:
                return
            if len(self._waiting) >= MOST_WAITING or (picture and self._pictures >= MOST_PICTURES):
                self._lost += 1
                if not self._full_told:
                    self._full_told = True
                    self._tell("is too slow: records are left out")
                return
            self._waiting.append((call, picture))
            self._pictures += picture
            self._changed.notify()

    def close(self, end: str) -> None:
        """Say how the run ended. From here on nothing is tried twice; `wait` says how that went."""
        with self._changed:
            self._end = end
            self._changed.notify()

    def wait(self, seconds: float) -> None:
        """Wait until everything is sent, at most ``seconds``; what is then not sent is left behind."""
        self._thread.join(max(0.0, seconds))
        late = self._thread.is_alive()
        with self._changed:
            missing, gone = len(self._waiting) + self._lost, self._given_up
            self._given_up = True
        if late:
            self._tracker.abandon()
            self._tell(f"did not close in time: {missing} records and the end of the run may be missing there")
        elif missing and not gone:
            self._tell(f"{missing} records are missing there")

    # --- in the thread

    def _work(self) -> None:
        where = self._attempt(lambda tracker: tracker.start())
        if where is None:
            self._give_up()
            return
        self._tell(str(where))
        failures = 0  # in a row
        while failures < TRIES_AT_THE_END or self._end is None:
            with self._changed:
                while not self._waiting and self._end is None:
                    self._changed.wait()
                if not self._waiting:
                    break
                call, picture = self._waiting[0]
            done = self._attempt(call) is not None
            failures = 0 if done else failures + 1
            with self._changed:
                self._waiting.popleft()
                self._pictures -= picture
                self._lost += not done
        # Where it is gone, the records that are left would each wait for it in vain.
        end = self._end
        if self._attempt(lambda tracker: tracker.finish(end)) is None:
            self._give_up()

    def _attempt(self, call: Call) -> object | None:
        """What ``call`` returned, or True; None where it failed too often, or once when the run is over."""
        pause, longest = self._pauses
        for number in range(self._tries):
            try:
                result = call(self._tracker)
            except BaseException as error:  # a library may end the thread by SystemExit as well
                if not self._failing:
                    self._failing = True
                    self._tell(f"fails ({_one_line(error)}); training goes on")
                with self._changed:
                    last = self._end is not None or number + 1 == self._tries
                    if not last:
                        self._changed.wait_for(lambda: self._end is not None, timeout=pause)
                if last:
                    return None
                pause = min(2 * pause, longest)
            else:
                if self._failing:
                    self._failing = False
                    self._tell("answers again")
                return True if result is None else result
        return None

    def _give_up(self) -> None:
        with self._changed:
            over = self._end is not None
            missing = len(self._waiting) + self._lost
            self._given_up = True
            self._waiting.clear()
        self._tracker.abandon()
        self._tell(
            f"was given up: {missing} records and the end of the run are missing there" if over else "is given up"
        )

    def _tell(self, text: str) -> None:
        self.told.append(f"tracker {self.name}: {text}")


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__


def wait_for_all(senders: list[Sender], seconds: float) -> None:
    """`Sender.wait` for each, ``seconds`` in all."""
    deadline = time.monotonic() + seconds
    for sender in senders:
        sender.wait(deadline - time.monotonic())
