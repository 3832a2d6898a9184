"""The agent of a job, among commands that only pretend to be SLURM's: what it starts, asks for and remembers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from launch import history
from launch.agent import port_of
from launch.decide import Budget
from launch.job import Job
from pipeline.core.files import stamp
from pipeline.record.beats import Pulse

FAKE = """#!{python}
import json, os, pathlib, sys, time
folder, name, words = pathlib.Path({folder!r}), os.path.basename(sys.argv[0]), sys.argv[1:]
with open(folder / "calls", "a") as calls:
    calls.write(json.dumps([name, *words]) + "\\n")
def fact(key, default):
    path = folder / key
    return path.read_text() if path.exists() else default
if words[:2] == ["show", "hostnames"]:
    print("n1\\nn2")
elif "show" in words:
    print("JobId=7 JobName=x " + fact("job", "JobState=RUNNING Reason=None Restarts=0"))
elif name == "sinfo":
    print(fact("nodes", "n1 allocated\\nn2 allocated"))
elif name == "squeue":
    print(fact("end", "UNLIMITED"))
elif name == "srun" and words[-1] in ("true", "nvidia-smi"):
    lost = fact("lost", "none")
    sys.exit(any(lost in word for word in words))
elif name == "srun":
    run = pathlib.Path({run!r})
    plan = json.loads((folder / "plan").read_text())
    end = plan.pop(0)
    (folder / "plan").write_text(json.dumps(plan))
    (folder / "environment").write_text(json.dumps(dict(os.environ)))
    if "wait" in end:
        (folder / "waiting").touch()
        while not (run / "stop").exists():
            time.sleep(0.02)
    (run / "beats").mkdir(exist_ok=True)
    beat = dict(rank=0, host="n1", pid=1, attempt=end["attempt"], step=end["step"], phase="step", time=0.0)
    if end["step"] is not None:
        (run / "beats" / "00000").write_text(json.dumps(beat) + "\\n" + json.dumps(dict(alive=None)) + "\\n")
    for node, why in end.get("bad", {{}}).items():
        (run / "launch").mkdir(exist_ok=True)
        (run / "launch" / "bad_nodes.json").write_text(json.dumps({{node: why}}))
    outcomes = {{0: "finished", 75: "requeue", 137: "running"}}
    code = end["code"]
    state = dict(outcome=outcomes.get(code, "failed"), exit_code=None if code == 137 else code, step=end["step"] or 0,
                 attempt=end["attempt"])
    (run / "state.new").write_text(json.dumps(state))
    (run / "state.new").rename(run / "state.json")
    sys.exit(code)
"""


class Place:
    """A run folder, and commands that note how they are called."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run, bin = folder, folder / "run", folder / "bin"
        bin.mkdir()
        self.run.mkdir()
        for name in ("srun", "scontrol", "squeue", "sinfo", "scancel"):
            (bin / name).write_text(FAKE.format(python=sys.executable, folder=str(folder), run=str(self.run)))
            (bin / name).chmod(0o755)
        self.job = Job("pretrain", str(self.run), ["-m", "pipeline.run", "train"], nodes=2, python=["python3"])

    def tell(self, **facts: str) -> None:
        for name, text in facts.items():
            (self.folder / name).write_text(text)

    def start(self, *ends: dict, program=("-m", "launch.agent"), **values) -> subprocess.Popen:
        (self.folder / "plan").write_text(json.dumps(ends))
        replace(self.job, **values).write(self.folder / "job.json")
        slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "PATH": f"{self.folder}/bin:{os.environ['PATH']}"}
        command = [sys.executable, *program, str(self.folder / "job.json")]
        return subprocess.Popen(command, env=os.environ | slurm, stderr=subprocess.PIPE, text=True)

    def agent(self, *ends: dict, **values) -> int:
        process = self.start(*ends, **values)
        self.said = process.communicate(timeout=120)[1]
        return process.returncode

    def calls(self, *begin: str) -> list[list[str]]:
        made = [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]
        return [call for call in made if call[: len(begin)] == list(begin)]

    @property
    def decisions(self) -> list[str]:
        return [a.decision for a in history.attempts(self.run)]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def ends(code: int, step: int | None = 4, attempt: int = 0, **more) -> dict:
    return {"code": code, "step": step, "attempt": attempt, **more}


def test_a_run_that_finishes(place: Place):
    (place.run / "stop").touch()  # of an earlier job
    environment = {"MY": "a b\n$(x)"}
    assert place.agent(ends(0, 12), environment=environment, srun=["--cpus-per-task=3"], interface="lo") == 0
    (step,) = place.calls("srun")
    assert step == [
        *("srun", "--kill-on-bad-exit=1", "--wait=60", "--unbuffered", "--nodes=2", "--ntasks=2"),
        *("--ntasks-per-node=1", "--cpus-per-task=3", "python3", "-m", "launch.rank", "-m", "pipeline.run", "train"),
    ]
    told = json.loads((place.folder / "environment").read_text())
    assert told["MY"] == environment["MY"] and told["PYTHONSAFEPATH"] == "1"
    assert (told["MASTER_ADDR"], told["MASTER_PORT"]) == ("127.0.0.1", str(port_of(7)))
    assert told["GLOO_SOCKET_IFNAME"] == told["NCCL_SOCKET_IFNAME"] == "lo"
    (attempt,) = history.attempts(place.run)
    assert (attempt.job, attempt.nodes, attempt.exit_code, attempt.step) == ("7", ["n1", "n2"], 0, 12)
    assert told["SLUICE_OLD_STOP"] == stamp(place.run / "stop"), "the ranks know what is not for them"


def test_a_crash_on_sound_nodes_starts_the_ranks_again(place: Place):
    assert place.agent(ends(137, 4), ends(1, 9, attempt=1), ends(0, 12, attempt=2)) == 0
    assert place.decisions == ["restart", "restart", "finished"]
    assert [a.step for a in history.attempts(place.run)] == [4, 9, 12]
    assert len([c for c in place.calls("srun") if c[-1] in ("true", "nvidia-smi")]) == 2  # all nodes were asked
    assert not place.calls("scontrol", "requeue")


@pytest.mark.parametrize(
    ("facts", "reason"),
    [({"nodes": "n1 allocated\nn2 down*"}, "is down*"), ({"lost": "n2"}, "cannot run")],
)
def test_a_lost_node_is_left_out(place: Place, facts, reason):
    place.tell(**facts)
    assert place.agent(ends(137, 4)) == 1
    bad = history.bad_nodes(place.run)
    assert place.decisions == ["requeue"] and list(bad) == ["n2"] and bad["n2"].startswith(reason)
    assert place.calls("scontrol", "requeue") == [["scontrol", "requeue", "7"]]
    update = ["scontrol", "update", "JobId=7", "StartTime=now+10", "ExcNodeList=n2"]
    assert place.calls("scontrol", "update") == [update]


def test_a_node_that_fails_the_preflight_is_left_out(place: Place):
    assert place.agent(ends(2, None, bad={"n1": "has no device"})) == 2
    assert place.decisions == ["requeue"]
    assert place.calls("scontrol", "update")[0][-1] == "ExcNodeList=n1"


@pytest.mark.parametrize(("code", "decision"), [(2, "stop"), (70, "stop"), (75, "requeue")])
def test_what_the_exit_code_decides_alone(place: Place, code, decision):
    assert place.agent(ends(code)) == code
    assert place.decisions == [decision]
    assert len(place.calls("srun")) == 1, "no node needs to be asked"
    assert len(place.calls("scontrol", "requeue")) == (decision == "requeue")


def test_a_job_that_slurm_queues_again_is_not_queued_twice(place: Place):
    place.tell(job="JobState=COMPLETING Reason=None Restarts=1")
    assert place.agent(ends(75)) == 75
    assert place.decisions == ["requeue"] and not place.calls("scontrol", "requeue")
    assert place.calls("scontrol", "update")


def test_a_cancelled_job_stays_so(place: Place):
    place.tell(job="JobState=COMPLETING Reason=None Restarts=0")
    assert place.agent(ends(75)) == 75
    assert place.decisions == ["stop"]
    assert not place.calls("scontrol", "requeue") and not place.calls("scontrol", "update")


def test_the_same_step_three_times_is_enough(place: Place):
    assert place.agent(*(ends(1, 4, attempt=n) for n in range(5))) == 1
    assert place.decisions == ["restart", "restart", "stop"]
    assert "failed 3 times in a row at step 4" in place.said


def test_budgets_hold(place: Place):
    assert place.agent(*(ends(1, n, attempt=n) for n in range(5)), budget=Budget(restarts=1)) == 1
    assert place.decisions == ["restart", "stop"] and "budget of 1 restarts is used up" in place.said


def test_a_job_whose_owner_wants_it_to_end_saves_first(place: Place):
    process = place.start(ends(75, 4, wait=True))
    while not (place.folder / "waiting").exists():
        time.sleep(0.02)
    history.ask_to_end(place.run, "8")
    time.sleep(0.5)
    assert not (place.run / "stop").exists()
    history.ask_to_end(place.run, "7")
    process.communicate(timeout=120)
    assert process.returncode == 75 and place.decisions == ["stop"]
    assert place.calls("scancel") == [["scancel", "7"]] and not place.calls("scontrol", "requeue")


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_becomes_the_stop_file(place: Place, number):
    process = place.start(ends(75, wait=True))
    while not (place.folder / "waiting").exists():
        time.sleep(0.02)
    process.send_signal(number)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 75 and f"asked to stop ({number.name})" in said


@pytest.mark.parametrize(("requeues", "decision"), [(1, "requeue"), (0, "stop")])
def test_a_killed_agent_is_missed(place: Place, requeues, decision):
    Pulse(place.run, 0, 0).at("step", 9)
    process = place.start(ends(75, wait=True), budget=Budget(requeues=requeues))
    while not (place.folder / "waiting").exists():
        time.sleep(0.02)
    (agent,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(agent), signal.SIGKILL)
    assert process.wait(120) == 1
    (place.run / "stop").touch()  # here nothing else ends what it had started
    said = process.communicate(timeout=120)[1]
    assert "the agent was killed by SIGKILL" in said and place.decisions == [decision]
    assert history.attempts(place.run)[0].step == 9
    assert len(place.calls("scontrol", "requeue")) == requeues


def test_a_signal_to_all_processes_of_the_job_is_one_request(place: Place):
    """The parent hands on what the agent has got as well."""
    process = place.start(ends(75, wait=True))
    while not (place.folder / "waiting").exists():
        time.sleep(0.02)
    (agent,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(agent), signal.SIGTERM)
    process.send_signal(signal.SIGUSR1)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 75 and said.count("asked to stop (") == 1


def test_a_signal_that_comes_first_of_all_is_not_lost(place: Place):
    """Also not when the agent is still asking SLURM about the job."""
    process = place.start(ends(75, wait=True))
    while not (place.folder / "calls").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGUSR1)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 75 and "asked to stop (SIGUSR1)" in said


def test_the_time_limit_is_known_without_a_signal(place: Place):
    place.tell(end="2000-01-01T00:00:00")
    assert place.agent(ends(75, wait=True)) == 75
    assert "the time limit is near" in place.said


def test_deepspeeds_launcher_is_one_task_per_node(place: Place):
    words = ["-m", "launch", "train", "c.toml", "--node-rank", "{node}", "--master", "{master}"]
    assert place.agent(ends(0), launcher="deepspeed", ranks_per_node=4, arguments=words, interface="lo") == 0
    (step,) = place.calls("srun")
    assert "--ntasks=2" in step and step[-4:] == ["--node-rank", "{node}", "--master", f"127.0.0.1:{port_of(7)}"]


def test_an_interface_that_is_not_there_is_a_message(place: Place):
    assert place.agent(interface="nowhere0") == 2
    assert "network interface 'nowhere0' has no IPv4 address here" in place.said and "Traceback" not in place.said


def test_a_port_that_is_taken_is_passed_over():
    first = port_of(7)
    with socket.create_server(("", first)):
        assert port_of(7) == first + 1
    assert port_of(7) == first != port_of(8)
