"""Two processes in which other candidates are fast take the choice of rank 0, or end together."""

from __future__ import annotations

import json

from tests.engine.training.choices import choosing_worker
from tests.support.ranks import run_ranks


def test_all_ranks_take_what_rank_0_found(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MIRL_CACHE", raising=False)
    run_ranks(choosing_worker.__name__, 2, {"out": str(tmp_path / "found"), "table": str(tmp_path / "table.json")})
    first, second = (json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in range(2))
    for case in ("each its own", "from a table"):
        assert first[case] == second[case]
        assert first[case]["backends"] == ["sdpa"]
    refused = first["one cannot"]["refused"]
    assert refused == second["one cannot"]["refused"]
    assert refused.startswith("choices says sdpa for attention of ") and "on rank 1 (NotImplementedError: " in refused
    assert first["no table"] == second["no table"] and "cannot be read" in first["no table"]["refused"]
    (cached,) = (tmp_path / "cache" / "mirl" / "choices").iterdir()
    found = first["each its own"]["table"]["findings"]["attention"]
    assert set(json.loads(cached.read_text())["findings"]["attention"]) == set(found)
