"""The documentation as a site: built without a warning, with every page, and working in a browser without a network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import mirl
from tests.support.browser import BROWSER, a_page
from tests.support.launch import CHECKOUT


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("site")
    # As in CI: a link that leads nowhere, or a page that is not in the navigation, ends the build.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    done = subprocess.run(
        command, cwd=CHECKOUT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def test_every_page_is_on_the_site(site):
    for page in (CHECKOUT / "docs").glob("*.md"):
        assert (site / page.stem / "index.html").is_file(), page
    assert "Masked Image Residual Learning" in (site / "index.html").read_text()
    assert list((site / "files" / "benchmarks" / "results").glob("*.json"))


def test_the_reference_has_every_name_of_the_face(site):
    page = (site / "reference" / "index.html").read_text()
    headings = set(re.findall(r"<h2[^>]*doc-heading[^>]*>\s*(?:<span[^>]*>)?mirl\.(\w+)\s*<", page))
    assert headings == set(mirl.__all__) - {"__version__"}


def test_nothing_is_loaded_from_another_host(site):
    for page in site.rglob("*.html"):
        assert not re.findall(r'(?:src="|<link[^>]*href=")(?:https?:)?//', page.read_text()), page


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address(site) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=site)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.process
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here (apt install chromium)")
def test_it_works_in_a_browser_at_the_width_of_a_desktop_and_of_a_phone(address, tmp_path):
    with a_page(tmp_path / "profile") as page:
        for width in (1280, 500):
            for name in ("", "systems/", "reference/", "benchmarks/"):
                page.open(f"http://{address}/{name}", width=width)
                assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (name, width)
                assert page.evaluate("Array.from(document.images).every(image => image.naturalWidth > 0)"), name
        page.open(f"http://{address}/")
        page.evaluate("document.querySelector('[data-md-component=search-query]').focus()")
        page.type("rank killed")
        page.wait_for("!!document.querySelector('.md-search-result__item a')")
        found = page.evaluate("Array.from(document.querySelectorAll('.md-search-result__item a')).map(a => a.href)")
        assert any("/faults/" in link for link in found), found
        page.evaluate("document.querySelector('.md-search-result__item a[href*=faults]').click()")
        page.wait_for("location.pathname == '/faults/' && document.readyState == 'complete'")
        assert page.hosts == {address} and not page.complaints
