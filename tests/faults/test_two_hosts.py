"""Two hosts with two ranks each give the losses of one host with four: `deepspeed --hostfile` over ssh, and torchrun on
both. See two_hosts.py.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.two_hosts import TwoHosts, missing
from tests.runs import ENTRY, TINY, losses

# pdsh passes no OMP_NUM_THREADS on, and each host would count all cores as its own: other threads, other sums.
FLAGS = ["--steps", "4", "--checkpoint-every", "4", "--pictures", "0", "--cpu-threads", "1"]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory) -> Iterator[TwoHosts]:
    reason = missing()
    if reason:
        pytest.skip(f"no two hosts here: {reason}")
    with TwoHosts(tmp_path_factory.mktemp("hosts")) as two:
        yield two


@pytest.fixture(scope="module")
def expected(_server, photographs, tmp_path_factory) -> dict[int, float]:
    """Losses of four ranks on one host."""
    folder = tmp_path_factory.mktemp("one_host")
    run = _server.start(folder, "--data", photographs, *FLAGS, "--out", "out", ranks=4)
    assert run.end() == [0, 0, 0, 0], run.output()[-3000:]
    return losses(folder / "out")


@pytest.mark.slow
def test_deepspeed_over_ssh(hosts, expected, environment, photographs, tmp_path):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("".join(f"{address} slots=2\n" for address in hosts.ADDRESSES))
    out = tmp_path / "out"
    command = ["deepspeed", "--hostfile", str(hostfile), ENTRY, *TINY, *FLAGS]
    result = hosts.run(0, [*command, "--data", str(photographs), "--out", str(out)], env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert losses(out) == expected
    shards = sorted(path.name for path in (out / "checkpoints" / "step-00000004").glob("rank-*"))
    assert shards == [f"rank-{rank:05d}-of-00004.safetensors" for rank in range(4)]


@pytest.mark.slow
def test_torchrun_on_both(hosts, expected, environment, photographs, tmp_path):
    out = tmp_path / "out"
    processes = []
    for host in (0, 1):
        command = ["torchrun", "--nnodes", "2", "--nproc-per-node", "2", "--node-rank", str(host)]
        command += ["--master-addr", hosts.ADDRESSES[0], "--master-port", "29500", ENTRY]
        command += [*TINY, *FLAGS, "--data", str(photographs), "--out", str(out)]
        output = (tmp_path / f"host-{host}.txt").open("w")
        processes.append(
            hosts.start(host, command, env=environment, cwd=tmp_path, stdout=output, stderr=subprocess.STDOUT)
        )
    codes = [process.wait(timeout=240) for process in processes]
    assert codes == [0, 0], _ends(tmp_path)
    assert losses(out) == expected


def _ends(folder: Path) -> str:
    return "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("host-*.txt")))
