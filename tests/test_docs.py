"""What the documents show runs: the snippets of docs/python.md in their order, in one folder, as a reader would."""

from __future__ import annotations

import re
import sys

from mirl import load_pretrained
from tests.engine.conftest import write_classes
from tests.support.launch import CHECKOUT
from tests.support.runs import write_photographs

SNIPPETS = re.findall(r"```python\n(.*?)```", (CHECKOUT / "docs" / "python.md").read_text(), re.S)


def test_every_snippet_of_the_python_page_is_short_and_runs_within_the_face(run, tmp_path):
    assert len(SNIPPETS) == 5
    assert max(len(snippet.splitlines()) for snippet in SNIPPETS) <= 15
    assert not any("mirl.engine" in snippet for snippet in SNIPPETS)
    (tmp_path / "photographs").mkdir()
    write_photographs(tmp_path / "photographs")
    for split in ("train", "val"):
        write_classes(tmp_path / "classes" / split, {"blue": 9, "red": 9})
    tiny = "depth=4, width=32, heads=2, segments=2, decoder_width=16, decoder_heads=2, tensorboard=False, out="
    script = "\n".join(SNIPPETS).replace('out="runs/mine"', tiny + '"runs/mine"')
    assert tiny in script
    done = run(sys.executable, "-c", script, env={"PYTHONPATH": str(CHECKOUT)})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "4 32 torch.Size([96, 32])" in done.stdout and "('blue', 'red') torch.Size([2, 32])" in done.stdout
    assert (tmp_path / "reconstruction.png").stat().st_size > 1000
    assert load_pretrained(tmp_path / "runs" / "mine").config.depth == 4
