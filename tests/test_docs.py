"""What the documents show runs: their snippets in their order, in one folder, as a reader would."""

from __future__ import annotations

import json
import re
import shlex
import sys

from mirl import load_pretrained
from mirl.engine.pretraining.command_line import parse_pretrain
from mirl.engine.transfer.detection.command_line import DETECT
from mirl.engine.transfer.segmentation.command_line import SEGMENT
from tests.engine.conftest import write_classes
from tests.support.launch import CHECKOUT
from tests.support.runs import write_photographs

ONE_BY_ONE = """
import json, sys
from mirl.engine.cli import dispatch
for _, *flags in json.loads(sys.argv[1]):
    print(end="\\0", flush=True)
    code = dispatch(flags)
    assert code == 0, (flags, code)
"""
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


def test_the_page_from_a_folder_to_a_classifier_runs_as_it_is_written(run, tmp_path):
    page = (CHECKOUT / "docs" / "first-classifier.md").read_text()
    said = {}
    for kind, text in re.findall(r"```(python|sh)\n(.*?)```", page, re.S):
        if kind == "python":
            done = run(sys.executable, "-c", text)
            assert done.returncode == 0, done.stderr
            continue
        lines = [shlex.split(line) for line in text.splitlines()]
        assert all(command == "mirl" for command, *_ in lines)
        # One process for the commands of a block: each start would load torch again.
        done = run(sys.executable, "-c", ONE_BY_ONE, json.dumps(lines), env={"PYTHONPATH": str(CHECKOUT)})
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        parts = done.stdout.split("\0")
        said |= {flags[0]: told for (_, *flags), told in zip(lines, parts[1:], strict=True)}
    assert list(said) == ["validate-data", "pretrain", "probe", "finetune", "evaluate", "predict", "export"]
    assert "240 images (240 JPEG), 0 broken" in said["validate-data"]
    (linear,) = re.findall(r"linear +top-1 +([0-9.]+)", said["probe"])
    assert float(linear) > 40, "four classes: the features say nothing"
    evaluation = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    assert "confusion" in json.dumps(evaluation)
    assert (tmp_path / "predictions.csv").read_text().count("\n") == 16
    assert list((tmp_path / "exported").glob("*.safetensors"))
    # Whatever the page shows is in the repository.
    for picture in re.findall(r"!\[[^]]*\]\(([^)]*)\)", page):
        assert (CHECKOUT / "docs" / picture).is_file(), picture


def test_every_command_of_the_papers_tables_is_one():
    """Each row that was not measured has flags that a run takes, and no two rows of a table the same."""
    page = (CHECKOUT / "docs" / "paper.md").read_text()
    rows = [line for line in page.splitlines() if "| not measured | `--" in line]
    flags = [line.rsplit("| `", 1)[1].removesuffix("` |") for line in rows]
    assert len(flags) == 23
    for words in flags:
        assert parse_pretrain([*shlex.split(words), "--data", "imagenet/train"]).recipe in words
    for command, recipe in re.findall(r"`mirl (detect|segment) --recipe (\w+)`", page):
        assert recipe in (DETECT if command == "detect" else SEGMENT).recipes
