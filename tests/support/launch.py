"""How tests start processes: where the checkout is, and the environment of a user's shell."""

from __future__ import annotations

import os
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
FIXTURES = CHECKOUT / "tests" / "fixtures"

_OF_AN_OUTER_LAUNCHER = {
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "TRITON_INTERPRET",
}  # fmt: skip


def launch_environment() -> dict[str, str]:
    """The environment of a user's shell with this interpreter's commands on PATH and no rank of an outer launcher."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in _OF_AN_OUTER_LAUNCHER and not name.startswith("PYTEST_")
    }
    return kept | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}", "OMP_NUM_THREADS": "1"}
