"""Going back to the last good checkpoint where a step left its band (`--on-spike rollback`), past the images of it.

A step that is left out fetches its images and takes no step, so that every later step has the images and masks that it
would have had. Of the first spike after a checkpoint the step itself is left out. What is computed again is then what
was computed before, so on a machine that computes the same again the run goes on as by `--on-spike skip`, to the bit;
what it got rid of is weights or moments that were no longer what the steps had made of them. Where that was not enough
and another spike comes before a checkpoint with a further step, the steps between checkpoint and spike are at fault,
and all of them are left out, as PaLM's authors did (Chowdhery et al. 2022, 5.1).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from mirl.dataloaders import TrainLoader
from mirl.engine.checkpoints.reader import CheckpointReader
from mirl.engine.distributed.ds_engine import TrainEngine
from mirl.engine.distributed.launch import Ranks
from mirl.engine.errors import Diverged
from mirl.engine.training.run_folder import Progress
from mirl.engine.training.run_log import RunLog
from mirl.engine.training.saving import Saver
from mirl.engine.training.task import Task

MOST_IN_A_ROW = 3  # rollbacks between which no checkpoint with a further step was written


@dataclass(eq=False, kw_only=True)
class Rollback:
    """Takes one rank back. All ranks make the same calls in the same order."""

    ranks: Ranks
    engine: TrainEngine
    task: Task
    loader: TrainLoader
    saver: Saver
    log: RunLog
    progress: Progress

    def leaves_out_next(self) -> bool:
        """Whether the next step is one that a rollback leaves out."""
        return self.progress.step + 1 in self.progress.left_out

    def go_back(self, detail: str) -> bool:
        """Set everything as in the newest good checkpoint before the spike that was just made and not taken.

        ``detail``: what is told of the spike. False, and nothing is changed, where this run has no checkpoint yet. A
        checkpoint that is being written is waited for.

        Raises:
            Diverged: `MOST_IN_A_ROW` rollbacks led no further.
        """
        progress, spiked = self.progress, self.progress.step
        self.saver.wait()
        self.saver.report()
        path = self.ranks.broadcast(self.saver.newest_good())
        if path is None:
            self.log.say(f"step {spiked}: there is no checkpoint yet to go back to, so the step is only skipped")
            return False
        reader = CheckpointReader(path)
        restored = Progress.from_state(reader.state)
        further = not progress.rollbacks or restored.applied_steps > progress.rolled_back_to
        in_a_row = 1 if further else progress.rollbacks + 1
        if in_a_row > MOST_IN_A_ROW:
            raise Diverged(
                f"step {spiked} left its band ({detail}), and {MOST_IN_A_ROW} rollbacks to {path} or a checkpoint with "
                "no further step did not help; the checkpoints are intact. Lower --base-lr, set --clip-grad 1, or "
                "resume from an earlier checkpoint"
            )
        new = [spiked] if in_a_row == 1 else range(restored.step + 1, spiked + 1)
        left_out = sorted({step for step in (*progress.left_out, *new) if step > restored.step})

        self.engine.restore(reader.read, optimizer_steps=restored.applied_steps)
        self.task.load(reader.read)
        self.loader.load_state_dict(reader.state["loader"])
        _set(progress, restored)
        progress.left_out, progress.rollbacks, progress.rolled_back_to = left_out, in_a_row, restored.applied_steps
        self.saver.went_back_to(path)
        steps = f"step {spiked}" if len(new) == 1 else f"steps {new[0]} to {spiked}"
        self.log.say(f"back to {path}, from where the run goes on without {steps} (rollback {in_a_row} in a row)")
        self.log.event("rollback", spiked, to_step=restored.step, path=str(path), left_out=left_out, in_a_row=in_a_row)
        return True


def _set(progress: Progress, restored: Progress) -> None:
    """Make ``progress``, which others hold, equal to ``restored``; its table of best values is held by others too."""
    best = progress.best
    for item in fields(Progress):
        setattr(progress, item.name, getattr(restored, item.name))
    best.clear()
    best.update(restored.best)
    progress.best = best
