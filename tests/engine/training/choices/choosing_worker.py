"""One rank of test_choice_of_ranks.py: what is slow differs by rank; writes what each case chose as JSON.

usage: python -m tests.engine.training.choices.choosing_worker < {"out": PREFIX, "table": FILE}
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch

from mirl.engine.configuration.config import RunConfig
from mirl.engine.distributed.launch import Ranks, join, leave
from mirl.engine.models import Execution
from mirl.engine.models.layers import HeadedAttention
from mirl.engine.training.choices import choosing
from mirl.engine.training.choices.attention import ATTENTION
from mirl.errors import UserError
from tests.engine.models.helpers import make_model, tiny_config
from tests.engine.training.choices.support import failing, slow


def chosen_by(ranks: Ranks, fast: str, broken: str, run: RunConfig) -> dict[str, Any]:
    """The backends and the table where all candidates but ``fast`` are slow on this rank, and ``broken`` raises."""

    def candidates(use, device):
        found = ATTENTION.candidates(use, device)
        return {
            name: failing if name == broken else made if name == fast else slow(made, 0.03)
            for name, made in found.items()
        }

    model = make_model(tiny_config(depth=4, segments=2, attention="auto"))
    model.set_execution(Execution())
    model.resolve_attention(torch.device("cpu"))
    choice = dataclasses.replace(ATTENTION, candidates=candidates)
    try:
        chosen = choosing.choose(model, ranks=ranks, run=run, batch=3, compiled=False, choices=(choice,))
    except UserError as error:
        return {"refused": str(error)}
    names = [layer.backend.name for layer in model.modules() if isinstance(layer, HeadedAttention)]
    return {"backends": sorted(set(names)), "table": json.loads(chosen.table.to_json())}


if __name__ == "__main__":
    torch.set_num_threads(1)
    settings = json.load(sys.stdin)
    place = join()
    measured, of_table = RunConfig(choices="measure"), RunConfig(choices=settings["table"])
    fast = ("sdpa", "sdpa_math")[place.rank]
    results = {"each its own": chosen_by(place, fast, "", measured)}
    if place.is_main:
        Path(settings["table"]).write_text(json.dumps(results["each its own"]["table"]))
    place.barrier()
    results["from a table"] = chosen_by(place, "sdpa_math", "", of_table)
    results["one cannot"] = chosen_by(place, "sdpa", "sdpa" if place.rank == 1 else "", measured)
    results["no table"] = chosen_by(place, "sdpa", "", RunConfig(choices=settings["table"] + ".none"))
    Path(f"{settings['out']}-{place.rank}.json").write_text(json.dumps(results))
    leave()
