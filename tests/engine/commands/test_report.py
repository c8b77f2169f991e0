"""`mirl report`: the page holds what the runs left, whatever they are called, and works in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from mirl.engine.analysis.run_page import MOST_PICTURES, _spread
from mirl.engine.analysis.run_record import differences, read_run
from mirl.engine.cli import dispatch
from mirl.errors import UserError

HOSTILE = "<script>alert(1)</script>&\"'"


def write_run(folder: Path, *, lr: float, colour: tuple[int, int, int] = (200, 30, 30)) -> Path:
    """A run of 30 steps that was resumed after 20, with pictures, a skipped step and a last line that a kill cut."""
    (folder / "pictures").mkdir(parents=True)
    config = {"recipe": "demo", "optim": {"lr": lr, "batch_size": 8}, "data": {"data": [HOSTILE]}}
    (folder / "config.json").write_text(json.dumps(config))
    before = config | {"optim": {"lr": 9.0, "batch_size": 8}}
    (folder / "config-history.jsonl").write_text(json.dumps({"step": 20, "time": 0, "config": before}) + "\n")
    lines = [{"step": step, "loss": 1 / step, "lr": lr, "images": 8 * step} for step in (10, 20)]
    lines += [{"event": "skipped_step", "step": 22, "time": 1.0, "detail": HOSTILE}]
    lines += [{"step": 20, "loss": 0.5, "gradient_norm": None}, {"step": 30, "loss": 0.25, "images": 240}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 40, "lo')
    start = f"MIRL engine 0\nrecipe demo\ndata 24 images from 25 files (1 left out: 1 {HOSTILE})\nfirst step begins 1 s"
    (folder / "log.txt").write_text(f"MIRL engine old\nfirst step begins 9 s\nstep 1\n{start}\nstep 30\n")
    for number, step in enumerate((10, 20, 30)):
        shade = tuple(channel // (number + 1) for channel in colour)
        Image.new("RGB", (1200, 200), shade).save(folder / "pictures" / f"step-{step:08d}.png")
    return folder


@pytest.fixture
def report(tmp_path: Path) -> Path:
    runs = [write_run(tmp_path / "one", lr=0.1), write_run(tmp_path / HOSTILE.replace("/", "_"), lr=0.2)]
    assert dispatch(["report", *map(str, runs), "--out", str(tmp_path / "report.html")]) == 0
    return tmp_path / "report.html"


def test_a_run_is_read_as_it_went(tmp_path):
    run = read_run(write_run(tmp_path / "one", lr=0.1))
    assert run.series("loss") == ([10, 20, 30], [0.1, 0.5, 0.25])  # of step 20, what came after the resume
    assert run.series("gradient_norm") == ([], []) and run.series("lr") == ([10, 20], [0.1, 0.1])
    assert run.opening[1:] == ["recipe demo", f"data 24 images from 25 files (1 left out: 1 {HOSTILE})"]
    assert [event["event"] for event in run.events] == ["skipped_step"] and sorted(run.pictures) == [10, 20, 30]
    assert run.history[0][0] == 20 and run.history[0][1]["optim.lr"] == 9.0
    other = read_run(write_run(tmp_path / "two", lr=0.2))
    assert differences([run, other]) == {"optim.lr": [0.1, 0.2]}


def test_pictures_are_spread_with_first_and_last():
    assert _spread([3, 5]) == [3, 5]
    many = _spread(list(range(100)))
    assert len(many) == MOST_PICTURES and many[0] == 0 and many[-1] == 99 and many == sorted(set(many))


class Tags(HTMLParser):
    """Counts tags, and what a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag, attrs):
        self.scripts += tag == "script"
        self.fetched += [
            value for name, value in attrs if name in ("src", "href") and value and not value.startswith(("#", "data:"))
        ]
        if tag in ("table", "div", "figure", "details", "script", "pre"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in ("table", "div", "figure", "details", "script", "pre"):
            assert self.open.pop() == tag


def test_the_page_is_whole_escaped_and_fetches_nothing(report):
    text = report.read_text()
    tags = Tags()
    tags.feed(text)
    assert not tags.open and not tags.fetched
    assert tags.scripts == 3  # two tables of pictures and the slider's
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)" in text
    assert "until step 20" in text and "1 skipped_step" in text
    assert "Data, machine and start" in text and "MIRL engine old" not in text
    for chart in ("loss", "lr"):
        assert f"<figcaption>{chart}</figcaption><svg" in text
    assert len(text) < 2**20


BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
PROBE = """<script>
const told = [];
addEventListener("error", event => told.push("error " + event.message), true);
addEventListener("load", async () => {
  const box = document.querySelector("[data-slider]"), image = box.querySelector("img");
  const read = async () => {
    await image.decode();
    const canvas = document.createElement("canvas"); canvas.width = canvas.height = 1;
    const context = canvas.getContext("2d"); context.drawImage(image, 0, 0);
    told.push(image.alt + " " + context.getImageData(0, 0, 1, 1).data[0]);
  };
  await read();
  const range = box.querySelector("input"); range.value = 0; range.dispatchEvent(new Event("input"));
  await read();
  told.push("width " + (document.documentElement.scrollWidth <= innerWidth));
  document.title = "PROBED " + told.join("; ");
});
</script>"""


@pytest.mark.process
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here (apt install chromium)")
@pytest.mark.parametrize("width", [1280, 500])
def test_the_slider_moves_the_picture_in_a_browser(report, width, tmp_path):
    page = tmp_path / "probed.html"
    page.write_text(report.read_text().replace("</head>", PROBE + "</head>"))
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", "--virtual-time-budget=5000",
        "--enable-logging=stderr", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    told = re.search(r"<title>PROBED (.*?)</title>", done.stdout)
    assert told, done.stderr[-2000:]
    last, first, fits = told[1].split("; ")
    assert last.startswith("step 30 ") and abs(int(last.split()[-1]) - 66) < 6
    assert first.startswith("step 10 ") and abs(int(first.split()[-1]) - 200) < 6
    assert fits == "width true" and "CONSOLE" not in done.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nothing", "--out", "x.html"], "nothing holds no run"),
        (["one", "--out", "taken.html"], "exists: give another name or --overwrite"),
        (["one", "--out", "x.pdf"], "give a file name that ends in .html"),
    ],
)
def test_wrong_words_are_refused(words, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "one", lr=0.1)
    (tmp_path / "taken.html").touch()
    with pytest.raises(UserError, match=told):
        dispatch(["report", *words])
    assert not (tmp_path / "x.html").exists()
