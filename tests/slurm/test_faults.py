"""The faults that SLURM can deal a job, for real: in the end, training has gone on with the same batches, or stopped.

Seconds are counted to the next step that is in the log. Undisturbed, a run of these makes its first one after about
five seconds on an idle machine.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from launch import history
from launch.agent import port_of
from tests.faults.matrix import Row
from tests.integration.runs import metrics, overrides
from tests.slurm.cluster import ADDRESS, parent, wait_for
from tests.slurm.jobs import OWN, START_SECONDS, Run, environment, train

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


@pytest.mark.fault(1, "SIGKILL a rank mid-step")
def test_killed_rank(cluster, shards, whole, tmp_path, fault_row: Row):
    job = train(cluster, tmp_path / "run", shards)
    job.wait_step(4)
    os.kill(job.beat(1).pid, signal.SIGKILL)
    killed = time.time()
    fault_row.seconds = job.seconds_to_next_step(killed)
    job.same_to_the_end(whole)
    assert job.decisions == ["restart", "finished"]
    assert job.attempts[0].exit_code == 1 and "all nodes are sound" in job.attempts[0].reason
    fault_row.case, fault_row.outcome = "SLURM, 2 nodes", "restart inside the allocation, same batches"


@pytest.mark.slow
@pytest.mark.fault(1, "SIGKILL the job's agent")
def test_killed_agent(cluster, shards, whole, tmp_path, fault_row: Row):
    job = train(cluster, tmp_path / "run", shards)
    job.wait_step(4)
    own = cluster.processes("SLURM_JOB_ID", job.job)
    agents = [pid for pid in own if b"launch.agent" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    (agent,) = [pid for pid in agents if parent(pid) in agents]
    os.kill(agent, signal.SIGKILL)
    killed = time.time()
    fault_row.seconds = job.seconds_to_next_step(killed)
    job.same_to_the_end(whole)
    assert job.decisions == ["requeue", "finished"], job.said()
    assert job.attempts[0].reason == "the agent was killed"
    fault_row.case, fault_row.outcome = "SLURM, 2 nodes", "its parent has the job queued again, same batches"


@pytest.mark.slow
@pytest.mark.fault(3, "kill a node: slurmd and all its processes")
def test_lost_node(cluster, shards, whole, tmp_path, fault_row: Row):
    job = train(cluster, tmp_path / "run", shards)
    job.wait_step(4)
    try:
        cluster.kill_node("n2")
        killed = time.time()
        fault_row.seconds = job.seconds_to_next_step(killed)
        job.same_to_the_end(whole)
    finally:
        cluster.start_node("n2")
        cluster.wait_nodes()
    assert job.decisions == ["requeue", "finished"], job.said()
    first, second = job.attempts
    assert (first.nodes, first.excluded, second.nodes) == (["n1", "n2"], ["n2"], ["n1", "n3"])
    assert list(history.bad_nodes(job.folder)) == ["n2"]
    fault_row.case, fault_row.outcome = "SLURM, 1 of 2 nodes", "requeued without the node, same batches"


@pytest.mark.slow
@pytest.mark.fault(3, "kill the node of the batch script")
def test_lost_first_node(cluster, shards, whole, tmp_path, fault_row: Row):
    job = train(cluster, tmp_path / "run", shards)
    job.wait_step(4)
    try:
        cluster.kill_node("n1")
        killed = time.time()
        fault_row.seconds = job.seconds_to_next_step(killed)
        job.same_to_the_end(whole)
    finally:
        cluster.start_node("n1")
        cluster.wait_nodes()
    assert job.decisions == ["finished"]  # the agent died with its node, so SLURM alone requeued
    assert job.attempts[0].nodes == ["n2", "n3"] and job.attempts[0].restart == 1
    fault_row.case, fault_row.outcome = "SLURM, 1 of 2 nodes", "requeued by SLURM, after its two minutes; same batches"


def scancel_usr1(job: Run) -> None:
    job.cluster.run("scancel", "--signal=USR1", job.job)


def batch_usr1(job: Run) -> None:
    job.cluster.run("scancel", "--batch", "--signal=USR1", job.job)


def requeue(job: Run) -> None:
    job.cluster.run("scontrol", "requeue", job.job)


def preempt(job: Run) -> None:
    job.cluster.run("sbatch", "-N3", "--exclusive", "-purgent", "--output=/dev/null", "--wrap", "sleep 3")


@pytest.mark.slow
@pytest.mark.fault(4, "asked to stop")
@pytest.mark.parametrize(
    "ask",
    [scancel_usr1, batch_usr1, requeue, preempt],
    ids=["scancel --signal=USR1", "scancel --batch --signal=USR1", "scontrol requeue", "preempted"],
)
def test_asked_to_stop(ask, cluster, shards, whole, tmp_path, fault_row: Row, request):
    job = train(cluster, tmp_path / "run", shards, "every.checkpoint=100ba", "data.workers=1")
    job.wait_step(4)
    ask(job)
    asked = time.time()
    fault_row.seconds = job.seconds_to_next_step(asked)
    job.same_to_the_end(whole)
    first = job.attempts[0]
    assert job.decisions == ["requeue", "finished"] and first.exit_code == 75, job.said()
    resumed = next(line["step"] for line in job.lines() if line["attempt"] == 1)
    assert first.step is not None and resumed == first.step + 1 > 5, "steps were made twice"
    assert "starts again in two minutes" not in job.said()
    fault_row.case = f"{request.node.callspec.id}; SLURM, 2 nodes, loader workers"
    fault_row.outcome = "saved, requeued without the two minutes, no step made twice"


@pytest.mark.slow
@pytest.mark.fault(4, "the time limit comes near")
def test_time_limit(cluster, shards, whole, tmp_path, fault_row: Row):
    job = train(
        cluster, tmp_path / "run", shards, "every.checkpoint=100ba", pause=12.0, time_limit="1", stop_seconds=25
    )
    job.wait_step(2)
    wait_for(lambda: job.attempts, 120, "the first attempt's end", job.said)
    ended = time.time()
    fault_row.seconds = job.seconds_to_next_step(ended)
    job.wait("COMPLETED")
    assert metrics(job.folder) == metrics(whole)
    assert set(job.decisions[:-1]) == {"requeue"} and job.decisions[-1] == "finished"
    assert all(a.exit_code == 75 for a in job.attempts[:-1]), job.said()
    fault_row.case = "--signal=B:USR1@25, SLURM's minimum of a minute"
    fault_row.outcome = "saved before it, requeued, no step made twice"


@pytest.mark.slow
def test_what_is_cancelled_stays_cancelled(cluster, shards, tmp_path):
    job = train(cluster, tmp_path / "run", shards, "every.checkpoint=100ba")
    job.wait_step(4)
    cluster.run("scancel", job.job)
    job.wait("CANCELLED")
    time.sleep(12)
    assert cluster.state(job.job) == "CANCELLED"
    assert job.decisions == ["stop"] and job.attempts[0].exit_code == 75  # saved all the same
    assert not cluster.processes("SLURM_JOB_ID", job.job)


@pytest.mark.slow
@pytest.mark.fault(10, "the same step fails three times")
def test_same_step_three_times(cluster, shards, tmp_path, fault_row: Row):
    job = train(cluster, tmp_path / "run", shards, die="1:5", pause=0.0)
    wait_for(lambda: len(job.attempts) == 2, START_SECONDS, "the second failure", job.said)
    second = time.time()
    job.wait("FAILED")
    assert job.decisions == ["restart", "restart", "stop"], job.said()
    # The other rank may have begun the step after.
    assert job.attempts[-1].reason in {f"failed 3 times in a row at step {step}" for step in (5, 6)}
    fault_row.case, fault_row.outcome = "SLURM, 2 nodes", "stopped after the third time, exit code 1"
    fault_row.seconds, fault_row.until = time.time() - second, "stopped"


@pytest.mark.slow
@pytest.mark.fault(9, "NaN on one rank")
def test_not_finite(cluster, shards, tmp_path, fault_row: Row):
    job = train(cluster, tmp_path / "run", shards, "optimizer.lr=1e30", "optimizer.weight_decay=1e30", pause=0.0)
    wait_for((job.folder / "beats" / "00001").exists, START_SECONDS, "a start", job.said)
    began = time.time()
    job.wait("FAILED")
    assert job.decisions == ["stop"] and job.attempts[0].exit_code == 70, job.said()
    fault_row.seconds, fault_row.until = time.time() - began, "stopped"
    fault_row.case, fault_row.outcome = "SLURM, 2 nodes", "stopped at once, exit code 70, not requeued"


@pytest.mark.slow
@pytest.mark.fault(13, "the master's port is taken")
def test_port_taken(cluster, shards, whole, tmp_path, fault_row: Row):
    import socket

    upcoming = int(cluster.run("sbatch", "--parsable", "-N1", "--output=/dev/null", "--wrap", "true")) + 1
    wanted = port_of(upcoming)
    with socket.create_server(("", wanted)):
        submitted = time.time()
        job = train(cluster, tmp_path / "run", shards, pause=0.0)
        assert int(job.job) == upcoming
        fault_row.seconds = job.seconds_to_next_step(submitted, attempt=0)
        job.same_to_the_end(whole)
    assert job.decisions == ["finished"]
    fault_row.case, fault_row.outcome = f"{ADDRESS}, SLURM", "takes the next port, trains"


@pytest.mark.slow
def test_deepspeeds_launcher_on_each_node(cluster, shards, whole, tmp_path):
    job = train(cluster, tmp_path / "run", shards, nodes=2, launcher="deepspeed", interface="lo")
    job.same_to_the_end(whole)
    assert job.decisions == ["finished"]


@pytest.mark.slow
def test_a_node_that_fails_the_preflight_is_left_out(cluster, shards, whole, tmp_path):
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if os.environ.get('SLURMD_NODENAME') == 'n2' and 'RANK' in os.environ:\n"
        "    import importlib.metadata as m\n"
        "    real = m.version\n"
        "    m.version = lambda name: '0.0' if name == 'timm' else real(name)\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLUICE_TEST_HOOK", str(hook))
        job = train(cluster, tmp_path / "run", shards, pause=0.0, setup=str(setup_file(tmp_path, hook)))
    job.same_to_the_end(whole)
    assert job.decisions == ["requeue", "finished"], job.said()
    assert job.attempts[0].excluded == ["n2"] and job.attempts[1].nodes == ["n1", "n3"]
    assert "timm 0.0" in history.bad_nodes(job.folder)["n2"]


def setup_file(folder: Path, hook: Path) -> Path:
    path = folder / "setup.sh"
    path.write_text(f'export PYTHONPATH="{hook}:$PYTHONPATH"\n')
    return path


def test_a_run_that_is_queued_is_not_submitted_again(cluster, shards, tmp_path):
    from launch import submit
    from pipeline.core.errors import SluiceError

    with environment(cluster):
        cluster.run("scontrol", "update", "PartitionName=work", "State=DOWN")
        try:
            job = train(cluster, tmp_path / "run", shards)
            with pytest.raises(SluiceError, match=f"job {job.job} of this run is pending"):
                train(cluster, tmp_path / "run", shards)
            settings = overrides(tmp_path / "run", shards, *OWN)
            after = submit.Request(Path(json_config(job)), settings, 2, after=job.job)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(submit, "check_there", lambda draft, profile: None)
                submit.submit(after, dry_run=False)
            follower = history.last_job(job.folder)
            assert f"afterany:{job.job}" in cluster.run("scontrol", "show", "job", str(follower))
            cluster.run("scancel", job.job, str(follower))
        finally:
            cluster.run("scontrol", "update", "PartitionName=work", "State=UP")


def json_config(job: Run) -> str:
    """The file that was submitted."""
    return json.loads((job.folder / "launch" / "jobs.jsonl").read_text().splitlines()[0])["config"]
