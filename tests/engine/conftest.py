"""A small data set for whole runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import write_photographs


@pytest.fixture(scope="session")
def photographs(tmp_path_factory) -> Path:
    return write_photographs(tmp_path_factory.mktemp("photographs"))
