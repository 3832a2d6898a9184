"""Real processes, with and without DeepSpeed's launcher between them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import local
from launch.local import child_environment, deepspeed_command
from launch.supervise import session_members, supervise
from pipeline.config.load import load_run
from pipeline.core.errors import LaunchError
from pipeline.core.files import stamp
from pipeline.record.lock import RunLock
from pipeline.record.state import INTERRUPTED, read_state
from tests.integration.runs import SMOKE

ROOT = Path(__file__).parents[3]
OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
FAKE = "tests.unit.launch.fake_run"
FINISHED = 'state={"outcome": "finished", "exit_code": 0}'
REQUEUE = 'state={"outcome": "requeue", "exit_code": 75}'
RUNNING = 'state={"outcome": "running", "exit_code": null}'
NONFINITE = 'state={"outcome": "failed", "exit_code": 70}'


def environment(procs=1):
    """Of a starter: without what other tests of this process have joined a group of one rank with."""
    own = child_environment(procs) | {"PYTHONPATH": str(ROOT)}
    return {name: value for name, value in own.items() if name not in OF_A_RANK}


def rank(folder, *words):
    return [sys.executable, "-m", FAKE, str(folder), *words]


def launcher(folder, *words):
    """A launcher that starts one rank and gives 0 when a signal kills it."""
    return rank(folder, f"launch={json.dumps(words)}")


def wait_for(condition, what, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(0.01)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def pids(folder):
    return [int(line) for line in (folder / "pids").read_text().splitlines()]


def assert_none_left(folder):
    assert pids(folder)
    wait_for(lambda: not any(map(alive, pids(folder))), "end of all processes")


def test_a_run_that_has_failed_and_does_not_end_is_killed(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("launch.supervise.LINGER_SECONDS", 0.5)
    failed = 'state={"outcome": "failed", "exit_code": 1, "step": 3, "attempt": 0}'
    assert supervise(rank(tmp_path, failed, "hang"), tmp_path, environment()) == 1
    assert "still there after" in capfd.readouterr().err
    assert_none_left(tmp_path)


def test_a_run_that_failed_before_is_not_taken_for_this_one(tmp_path, monkeypatch):
    monkeypatch.setattr("launch.supervise.LINGER_SECONDS", 0.0)
    (tmp_path / "state.json").write_text('{"outcome": "failed", "exit_code": 1, "step": 3, "attempt": 0}')
    assert supervise(rank(tmp_path, "wait=3", FINISHED), tmp_path, environment()) == 0


def test_a_folder_in_use_is_left_as_it_is(tmp_path):
    held = RunLock(tmp_path)
    held.take()
    (tmp_path / "stop").touch()
    with pytest.raises(LaunchError, match=f"in use by process {os.getpid()}"):
        supervise(rank(tmp_path, FINISHED), tmp_path, environment())
    assert (tmp_path / "stop").exists() and not (tmp_path / "pids").exists()
    held.release()


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ([FINISHED], 0),
        ([NONFINITE, "leave=70"], 70),
        ([REQUEUE, "leave=75"], 75),
        (['state={"outcome": "failed", "exit_code": 2}', "leave=2"], 2),
        (['state={"outcome": "failed", "exit_code": 1}', "leave=1"], 1),
        ([RUNNING, "leave=1"], 1),
        ([RUNNING, "send_me=9"], 1),
        ([RUNNING], 1),  # 0 from the launcher, and a run that has not ended
        ([RUNNING, "leave=70"], 70),  # a rank that stopped before the first could say so
        (["leave=2"], 2),  # a mistake, found before the run began
        (["leave=75"], 1),  # nothing was saved
        ([], 1),  # 0 from the launcher, and no run
        ([NONFINITE], 70),  # 0 from the launcher, but the run says otherwise
    ],
)
def test_exit_code(tmp_path, capfd, words, code):
    assert supervise(launcher(tmp_path, *words), tmp_path, environment()) == code
    assert_none_left(tmp_path)
    assert ("start it again" in capfd.readouterr().err) == (code == 1)


def test_what_an_earlier_run_left_behind_is_not_this_run_s(tmp_path):
    (tmp_path / "state.json").write_text('{"outcome": "finished", "exit_code": 0}')
    (tmp_path / "stop").touch()
    assert supervise(rank(tmp_path, "tell", "leave=1"), tmp_path, environment()) == 1
    told = json.loads((tmp_path / "rank-None.json").read_text())
    assert told["SLUICE_OLD_STOP"] == stamp(tmp_path / "stop"), "nor removed before it is known that it runs"


def test_who_was_killed_by_ctrl_c_twice_has_not_failed(tmp_path, started):
    (tmp_path / "state.json").write_text('{"outcome": "running", "exit_code": null, "step": 3, "attempt": 0}')
    process = started(rank(tmp_path, "until=never"))
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    assert process.wait(60) == 1
    found = read_state(tmp_path)
    assert found is not None and found.error == INTERRUPTED


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(LaunchError, match=r"cannot write the run folder .*; set run\.folder"):
        supervise(rank(tmp_path), tmp_path / "file" / "run", environment())


def test_rank_that_its_launcher_left_behind_is_killed(tmp_path):
    words = ["ignore=15", RUNNING, "kill_parent", "hang"]
    assert supervise(launcher(tmp_path, *words), tmp_path, environment()) == 1
    assert len(pids(tmp_path)) == 2
    assert_none_left(tmp_path)


def test_stopped_process_is_killed_too(tmp_path):
    words = [RUNNING, "kill_parent", f"send_me={int(signal.SIGSTOP)}", "hang"]
    assert supervise(launcher(tmp_path, *words), tmp_path, environment()) == 1
    assert_none_left(tmp_path)


@pytest.fixture
def started(tmp_path):
    """Start a supervisor of its own for a command, and wait until the command is ready."""
    processes = []

    def start(command):
        code = (
            "import sys, os, pathlib; from launch.supervise import supervise;"
            "sys.exit(supervise(sys.argv[2:], pathlib.Path(sys.argv[1]), os.environ))"
        )
        full = [sys.executable, "-c", code, str(tmp_path), *command]
        with open(tmp_path / "err", "w") as err:
            processes.append(subprocess.Popen(full, env=environment(), stderr=err))
        wait_for((tmp_path / "ready").exists, "readiness")
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_request_to_stop_reaches_the_ranks(tmp_path, started, number):
    supervisor = started(launcher(tmp_path, RUNNING, "until_asked", REQUEUE, "leave=75"))
    supervisor.send_signal(number)
    assert supervisor.wait(timeout=60) == 75
    assert "asked to stop" in (tmp_path / "err").read_text()
    assert (tmp_path / "stop").exists()
    assert_none_left(tmp_path)


@pytest.mark.parametrize("word", ["until_file", "ignore=10"])
def test_process_without_a_handler_does_not_die_of_the_request(tmp_path, started, word):
    supervisor = started(launcher(tmp_path, word, "until_file", REQUEUE, "leave=75"))
    supervisor.send_signal(signal.SIGUSR1)
    assert supervisor.wait(timeout=60) == 75


def test_second_interrupt_kills(tmp_path, started):
    supervisor = started(launcher(tmp_path, "ignore=2", "ignore=15", RUNNING, "hang"))
    supervisor.send_signal(signal.SIGINT)
    wait_for((tmp_path / "stop").exists, "request")
    supervisor.send_signal(signal.SIGINT)
    assert supervisor.wait(timeout=60) == 1
    assert_none_left(tmp_path)


def test_killed_supervisor_takes_the_ranks_along(tmp_path, started):
    supervisor = started(launcher(tmp_path, "ignore=15", "ignore=1", RUNNING, "hang"))
    supervisor.kill()
    assert_none_left(tmp_path)


def test_ignored_hangup_stays_ignored(tmp_path):
    words = rank(tmp_path, "until_file", FINISHED)
    code = (
        "import signal, sys, os, pathlib, threading; signal.signal(signal.SIGHUP, signal.SIG_IGN);"
        "from launch.supervise import supervise;"
        "threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGHUP)).start();"
        "threading.Timer(1.0, lambda: pathlib.Path(sys.argv[1], 'stop').touch()).start();"
        "sys.exit(supervise(sys.argv[2:], pathlib.Path(sys.argv[1]), os.environ))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), *words],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_members_of_a_session(tmp_path):
    child = subprocess.Popen(launcher(tmp_path, "until_asked"), env=environment(), start_new_session=True)
    wait_for((tmp_path / "ready").exists, "readiness")
    members = session_members(child.pid)
    assert sorted(m.pid for m in members) == sorted(pids(tmp_path))
    assert [m.pid for m in members if m.catches(signal.SIGUSR1)] == [pids(tmp_path)[1]]
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    wait_for(lambda: not session_members(child.pid), "end")


def deepspeed(folder, *words, procs=2):
    return deepspeed_command(FAKE, [str(folder), *words], procs, environment(procs))


def test_deepspeed_starts_the_ranks(tmp_path):
    odd = "state=" + json.dumps(
        {"outcome": "finished", "exit_code": 0, "note": "a b; $(touch x) 'c' \"d\"\n--hostfile"}
    )
    assert supervise(deepspeed(tmp_path, "tell", odd), tmp_path, environment(2)) == 0
    facts = [json.loads((tmp_path / f"rank-{r}.json").read_text()) for r in range(2)]
    assert [(f["RANK"], f["LOCAL_RANK"], f["WORLD_SIZE"]) for f in facts] == [("0", "0", "2"), ("1", "1", "2")]
    assert all(f["argv"] == [str(tmp_path), "tell", odd] for f in facts)
    assert_none_left(tmp_path)


def test_deepspeed_launcher_killed_under_its_runner(tmp_path):
    """The runner then gives 0, and the ranks would train on."""
    assert supervise(deepspeed(tmp_path, "ignore=15", RUNNING, "kill_parent", "hang"), tmp_path, environment(2)) == 1
    assert_none_left(tmp_path)


def test_devices_that_are_named_are_the_ones_that_are_used():
    named = environment() | {"CUDA_VISIBLE_DEVICES": "2, 5,7"}
    named.pop("DS_ACCELERATOR", None)
    assert "--include=localhost:2,5" in deepspeed_command(FAKE, [], 2, named)
    assert "--include=localhost:2,5" in deepspeed_command(FAKE, [], 2, named | {"CUDA_VISIBLE_DEVICES": "2,5"})
    for devices in ("0", "GPU-1,GPU-2"):
        with pytest.raises(LaunchError, match="does not name 2 devices by number"):
            deepspeed_command(FAKE, [], 2, named | {"CUDA_VISIBLE_DEVICES": devices})
    assert "--num_gpus=2" in deepspeed_command(FAKE, [], 2, named | {"DS_ACCELERATOR": "cpu"})


def test_no_device_is_the_processor(monkeypatch, tmp_path):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(local, "_CUDA", tmp_path / "none")
    assert child_environment(1)["DS_ACCELERATOR"] == "cpu"
    monkeypatch.setattr(local, "_CUDA", tmp_path)
    assert "DS_ACCELERATOR" not in child_environment(1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert child_environment(1)["DS_ACCELERATOR"] == "cpu"
    monkeypatch.setenv("DS_ACCELERATOR", "xpu")
    assert child_environment(1)["DS_ACCELERATOR"] == "xpu", "who has set it knows better"


def test_a_run_here_is_told_all_that_the_command_was_told(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(local, "supervise", lambda command, folder, environment: made.append((command, folder)) or 75)
    config = load_run(SMOKE / "mae.toml", [f"run.folder='{tmp_path}'"])
    words = ["train", "--config", "a b.toml", "--set", "x=$(y)", "--set", "z='1'\n"]
    for procs in (1, 2):
        assert local.train(config, Path("a b.toml"), ["x=$(y)", "z='1'\n"], procs) == 75
    (alone, folder), (together, _) = made
    assert alone == [sys.executable, "-m", "pipeline.run", *words] and folder == tmp_path
    assert together[-len(words) - 2 :] == ["--module", "pipeline.run", *words]
    assert f"--hostfile={os.devnull}" in together, "the launcher would take hosts from a file that it finds"


def test_threads_are_shared_out(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0))
    assert child_environment(cores)["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in child_environment(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert child_environment(2)["OMP_NUM_THREADS"] == "7"
