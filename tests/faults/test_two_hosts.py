"""Two hosts give the losses of one with as many ranks: `deepspeed --hostfile` over ssh with two ranks on each host,
torchrun with one, and the batch script of docs/clusters.md under Slurm with one. See two_hosts.py and slurm_cluster.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mirl.engine.errors import EXIT_PREEMPTED
from tests.faults import slurm_cluster
from tests.faults.two_hosts import TwoHosts, missing
from tests.support.files import wait_for
from tests.support.launch import CHECKOUT
from tests.support.runs import ENTRY, TINY, events, losses
from tests.support.started_ranks import MARK, RankServer, marked_processes

# pdsh passes no OMP_NUM_THREADS on, and each host would count all cores as its own: other threads, other sums.
MEET = """
import os
from mirl.engine.distributed import launch
from mirl.engine.errors import run_entry_point
def main():
    ranks = launch.join()
    ranks.barrier()
    launch.leave()
    os.write(1, b"met %d %d\\n" % (ranks.rank, ranks.world_size))  # one call: srun merges what its tasks write
run_entry_point(main)
"""
FLAGS = ["--steps", "8", "--checkpoint-every", "8", "--pictures", "0", "--cpu-threads", "1"]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory) -> Iterator[TwoHosts]:
    reason = missing()
    if reason:
        pytest.skip(f"no two hosts here: {reason}")
    with TwoHosts(tmp_path_factory.mktemp("hosts")) as two:
        yield two


def losses_of_one_host(server: RankServer, ranks: int, *flags: str | Path, folder: Path) -> dict[int, float]:
    run = server.start(folder, *flags, "--out", "one", ranks=ranks)
    assert run.end() == [0] * ranks, run.output()[-3000:]
    return losses(folder / "one")


@pytest.fixture(scope="module")
def losses_of_four(_server, photographs, tmp_path_factory) -> dict[int, float]:
    return losses_of_one_host(_server, 4, "--data", photographs, *FLAGS, folder=tmp_path_factory.mktemp("one_host"))


@pytest.mark.slow
def test_deepspeed_over_ssh(hosts, losses_of_four, environment, photographs, tmp_path):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("".join(f"{address} slots=2\n" for address in hosts.ADDRESSES))
    out = tmp_path / "out"
    command = ["deepspeed", "--hostfile", str(hostfile), ENTRY, *TINY, *FLAGS]
    result = hosts.run(0, [*command, "--data", str(photographs), "--out", str(out)], env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert losses(out) == losses_of_four
    shards = sorted(path.name for path in (out / "checkpoints" / "step-00000008").glob("rank-*"))
    assert shards == [f"rank-{rank:05d}-of-00004.safetensors" for rank in range(4)]


@pytest.mark.slow
def test_torchrun_on_both(hosts, server, environment, photographs, tmp_path):
    expected = losses_of_one_host(server, 2, "--data", photographs, *FLAGS, folder=tmp_path)
    out = tmp_path / "out"
    processes = []
    for host in (0, 1):
        command = ["torchrun", "--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(host)]
        command += ["--master-addr", hosts.ADDRESSES[0], "--master-port", "29500", ENTRY]
        command += [*TINY, *FLAGS, "--data", str(photographs), "--out", str(out)]
        output = (tmp_path / f"host-{host}.txt").open("w")
        processes.append(
            hosts.start(host, command, env=environment, cwd=tmp_path, stdout=output, stderr=subprocess.STDOUT)
        )
    codes = [process.wait(timeout=240) for process in processes]
    assert codes == [0, 0], _ends(tmp_path)
    assert losses(out) == expected


@pytest.fixture
def slurm(hosts, tmp_path) -> Iterator[slurm_cluster.Slurm]:
    if not os.environ.get("MIRL_TEST_SLURM"):
        pytest.skip("starts Slurm's daemons: set MIRL_TEST_SLURM=1")
    reason = slurm_cluster.missing()
    if reason:
        pytest.skip(f"no Slurm here: {reason}")
    with slurm_cluster.Slurm(hosts, tmp_path / "slurm") as cluster:
        yield cluster


@pytest.mark.slow
def test_the_documented_slurm_script_goes_on_after_its_time_limit(slurm, server, environment, photographs, tmp_path):
    out, output = tmp_path / "out", tmp_path / "slurm-1.out"
    flags = ["--data", str(photographs), *FLAGS, "--steps", "16", "--checkpoint-every", "16"]
    script = documented_script(
        {
            "--nodes=4": "--nodes=2",
            "--ntasks-per-node=8": "--ntasks-per-node=1",
            "#SBATCH --gpus-per-node=8\n": "",
            "--cpus-per-task=12": "--cpus-per-task=1",
            "engine/pretrain.py": ENTRY,
            "--recipe vit_b_48_300 --data /data/train --out /shared/vit_b_48": " ".join(
                [*TINY, *flags, "--out", str(out)]
            ),
        }
    )
    (tmp_path / "job.sh").write_text(script)
    assert slurm.run("sbatch", "--parsable", "job.sh", env=environment, cwd=tmp_path).strip() == "1"
    wait_for(output, "step  2/16")
    rank = next(item for item in marked_processes(environment[MARK]) if item.cmdline()[1:2] == [ENTRY])
    rank.suspend()  # or the run might be over before the signal comes
    slurm.run("scancel", "--signal=TERM", "1")  # as --signal does before the limit, which is minutes at least
    wait_for(output, "CANCELLED")
    rank.resume()
    wait_for(output, "finished:")
    text = output.read_text()
    assert text.count("FRESH START") == text.count("resumed from") == 1, text
    (stopped,) = events(out, "stopped")
    assert stopped["exit_code"] == EXIT_PREEMPTED
    assert losses(out) == losses_of_one_host(server, 2, *flags, folder=tmp_path)
    deadline = time.monotonic() + 30
    while "JobState=COMPLETED" not in (job := slurm.run("scontrol", "show", "job", "1")):
        assert time.monotonic() < deadline, job
        time.sleep(0.1)
    assert "Restarts=1" in job and "ExitCode=0:0" in job


@pytest.mark.slow
def test_a_batch_script_without_an_address_is_refused_and_does_as_it_is_told(slurm, environment, tmp_path):
    """The line that each task's refusal tells to export is put above srun, word for word."""
    program = tmp_path / "meet.py"
    program.write_text(MEET)
    head = ["#!/bin/bash", "#SBATCH --nodes=2 --ntasks-per-node=1", "export OMP_NUM_THREADS=1"]
    environment = {name: value for name, value in environment.items() if name != "MASTER_ADDR"}

    def job(number: int, *lines: str) -> str:
        (tmp_path / "job.sh").write_text(
            "\n".join([*head, *lines, f"srun {sys.executable} {program}; echo ended"]) + "\n"
        )
        slurm.run("sbatch", "--parsable", "--output", f"{number}.out", "job.sh", env=environment, cwd=tmp_path)
        wait_for(tmp_path / f"{number}.out", "ended")
        return (tmp_path / f"{number}.out").read_text()

    refused = job(1)
    lines = [line for line in refused.splitlines() if line.startswith("error: ")]
    assert lines and "Traceback" not in refused, refused
    told = re.search(r"for 2, (export MASTER_ADDR=.*) in the batch script and start them with srun$", lines[0])[1]
    met = job(2, told)
    assert {"met 0 2", "met 1 2"} <= set(met.splitlines()), met


def documented_script(replaced: dict[str, str]) -> str:
    """The batch script of docs/clusters.md with each key of ``replaced`` replaced."""
    lines = (CHECKOUT / "docs" / "clusters.md").read_text().splitlines(keepends=True)
    begin = lines.index("    #!/bin/bash\n")
    script = textwrap.dedent("".join(lines[begin : lines.index("\n", begin)]))
    for old, new in replaced.items():
        assert old in script, f"{old} is not in the script of docs/clusters.md"
        script = script.replace(old, new)
    return script


def _ends(folder: Path) -> str:
    return "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("host-*.txt")))
