"""What the site has beside the files of docs/: README and the other pages of the repository, and the Python reference.

A page keeps the links that it has on a repository's web page; here those that leave docs/ are pointed to their place on
the site.
"""

from __future__ import annotations

import ast
import atexit
import posixpath
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
# Page of the site -> file of the repository.
PAGES = {
    "index.md": "README.md",
    "benchmarks.md": "benchmarks/README.md",
    "log.md": "benchmarks/LOG.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "license.md": "LICENSE",
}
SITE_OF = {file: page for page, file in PAGES.items()}
LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)#\s]+)")


@event_priority(100)  # before mkdocstrings, which reads its paths there
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Show mkdocstrings the package in one folder: in a checkout its parts stand beside `mirl/`."""
    folder = Path(tempfile.mkdtemp(prefix="mirl-site-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    package = folder / "mirl"
    package.mkdir()
    for path in [*(ROOT / "mirl").glob("*.py"), *(ROOT / name for name in ("engine", "kernels", "dataloaders"))]:
        (package / path.name).symlink_to(path)
    options = config.plugins["mkdocstrings"].config["handlers"]["python"]
    options["paths"] = [str(folder)]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the repository, the figures that they link to, and the reference."""
    for page, file in PAGES.items():
        text = (ROOT / file).read_text()
        if file == "LICENSE":
            text = f"# Licence\n\n```\n{text}```\n"
        files.append(File.generated(config, page, content=_relinked(text, file, page)))
        for target in _targets(text, file):
            path = ROOT / target
            if path.is_file() and path.suffix in (".png", ".json", ".md") and not _page_of(target):
                # A file that is shown or read as it is.
                files.append(File.generated(config, _place_of(target), abs_src_path=str(path)))
    files.append(File.generated(config, "reference.md", content=reference()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point the links of docs/ that leave it to the site's pages."""
    uri = page.file.src_uri
    return markdown if uri in PAGES or uri == "reference.md" else _relinked(markdown, f"docs/{uri}", uri)


def reference() -> str:
    """The page of the Python face: each name that `import mirl` offers, from the docstring where it is defined."""
    lines = [
        "# Reference",
        "",
        "Everything below is imported as `mirl.NAME`. [Python](python.md) shows it at work.",
        "",
    ]
    for name, home in sorted(_homes(ROOT / "mirl").items(), key=lambda item: item[0].lower()):
        if name != "__version__":  # no object with a docstring
            path = _defined_in(name, home)
            lines += [f"::: {path}", "    options:", f"      heading: mirl.{name}", f"      toc_label: {name}", ""]
    return "\n".join(lines)


def _defined_in(name: str, home: str) -> str:
    """The dotted path of ``name``, which the room ``home`` defines or knows the home of."""
    folder = ROOT / home.replace(".", "/")
    inner = _homes(folder).get(name) if folder.is_dir() else None
    return _defined_in(name, f"{home}.{inner}") if inner else f"mirl.{home}.{name}"


def _homes(package: Path) -> dict[str, str]:
    """Where the names are defined that a package imports when they are asked for."""
    for node in ast.parse((package / "__init__.py").read_text()).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if getattr(target, "id", "") in ("_HOMES", "_HOME"):
            return ast.literal_eval(node.value)
    return {}


def _relinked(text: str, file: str, page: str) -> str:
    """``text`` of ``file`` with its links as they are from ``page`` of the site."""

    def replaced(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(file), found[2]))
        place = _page_of(target) or _place_of(target)
        return found[1] + posixpath.relpath(place, posixpath.dirname(page) or ".")

    return LINK.sub(replaced, text)


def _targets(text: str, file: str) -> set[str]:
    """Files of the repository that ``text`` of ``file`` links to."""
    return {posixpath.normpath(posixpath.join(posixpath.dirname(file), found[2])) for found in LINK.finditer(text)}


def _page_of(target: str) -> str | None:
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    return SITE_OF.get(target)


def _place_of(target: str) -> str:
    """Where a file that is no page stands on the site."""
    return "files/" + target
