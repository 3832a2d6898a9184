"""`sluice submit` refuses what cannot run before it is queued, and a dry run shows what would be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w

from launch import history, profile, slurm, submit
from launch.history import Submitted
from launch.submit import Request
from pipeline.core.errors import ConfigError, LaunchError, SluiceError
from tests.integration.runs import SMOKE, overrides

ROOT = Path(__file__).parents[3]


@pytest.fixture
def request_of(glyphs: Path, tmp_path: Path):
    def make(*more: str, **values) -> Request:
        settings = overrides(tmp_path / "run", glyphs / "train", "engine.micro_batch=1", *more)
        return Request(SMOKE / "mae.toml", settings, **values)

    return make


def dry(request: Request) -> str:
    return submit.submit(request, dry_run=True)


def write(path: Path, **values) -> Path:
    path.write_text(tomli_w.dumps(values))
    return path


def test_a_dry_run_shows_the_job_and_leaves_nothing(request_of, tmp_path):
    cluster = write(
        tmp_path / "alps.toml",
        partition="gpu",
        account="a1",
        gpus_per_node=4,
        cpus_per_rank=8,
        memory_gb=1.5,
        exclusive=True,
        modules=["cuda/12"],
        environment={"A": "b c"},
        interface="ib0",
        container={"command": ["apptainer", "exec", "x.sif"], "python": "python3.11"},
        sbatch=["--reservation=r"],
    )
    shown = dry(request_of(nodes=2, cluster=str(cluster), time="1:00:00"))
    for text in (
        "a global batch of 8 = 8 ranks x 1 x 1; 12 steps",
        "--nodes=2 --ntasks-per-node=4 --cpus-per-task=8 --gpus-per-node=4 --mem=1536M --partition=gpu --account=a1",
        "--time=1:00:00 --signal=B:USR1@300 --exclusive --reservation=r",
        'exec "${SLUICE_PYTHON:?}" -m launch.agent "${SLUICE_JOB:?}"',
        "python: ['apptainer', 'exec', 'x.sif', 'python3.11']",
        "interface: ib0",
        "--procs 8, in the job's own environment",
    ):
        assert text in shown
    assert not (tmp_path / "run").exists()


def test_a_dry_run_imports_no_framework(request_of, tmp_path):
    given = request_of(nodes=2)
    words = [w for s in given.overrides for w in ("--set", s)]
    command = ["submit", str(given.config), *words, "--nodes", "2", "--dry-run"]
    code = (
        "import sys; sys.argv = ['sluice', *sys.argv[1:]]\n"
        "from launch.cli import app\n"
        "app(standalone_mode=False)\n"
        "print('HEAVY', sorted({'torch', 'numpy', 'timm', 'PIL', 'deepspeed', 'webdataset'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("HEAVY []\n"), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("more", "values", "words"),
    [
        (["run.global_batch=9"], {"nodes": 2}, "9"),
        (["data.train='nowhere'"], {}, "no manifest at nowhere"),
        (["data.keep='no-such-list.txt'"], {}, "no-such-list.txt"),
        ([f"run.folder='{SMOKE}/mae.toml/run'"], {}, "mae.toml cannot be written"),
        (["run.folder='a\\b'"], {}, "backslash"),
        ([], {"array": "0-3"}, "--array does not belong"),
        ([], {"after": "7;rm"}, "--after 7;rm: the number of a job"),
        ([], {"cluster": "nowhere"}, "no cluster profile"),
        ([], {"time": "9:59"}, "of a limit of 9:59 the last 300 s"),
        ([], {"time": "tomorrow"}, "time limit 'tomorrow': write it like 24:00:00"),
    ],
)
def test_what_cannot_run_is_refused(request_of, more, values, words):
    with pytest.raises(SluiceError, match=words.replace(".", "[.]")):
        dry(request_of(*more, **values))


def test_all_that_is_wrong_is_said_at_once(request_of):
    with pytest.raises(ConfigError) as caught:
        dry(request_of("data.train='nowhere'", f"run.folder='{SMOKE}/mae.toml/run'"))
    assert "no manifest" in str(caught.value) and "cannot be written" in str(caught.value)


def test_a_shard_that_is_missing_is_noticed(request_of, glyphs, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for file in (glyphs / "train").iterdir():
        (data / file.name).symlink_to(file)
    gone = sorted(data.glob("*.tar"))[1]
    gone.unlink()
    with pytest.raises(ConfigError, match=f"1 of 7 shards are missing, {gone} first"):
        dry(request_of(f"data.train='{data}'"))


def test_a_run_in_the_queue_is_refused_unless_this_follows_it(request_of, tmp_path, monkeypatch):
    history.append(tmp_path / "run", Submitted("", "7", "x", 1, None, "c", ["submit"]))
    monkeypatch.setattr(slurm, "states", lambda jobs: dict.fromkeys(jobs, "RUNNING"))
    with pytest.raises(ConfigError, match="job 7 of this run is running"):
        dry(request_of())
    assert "--dependency=afterany:7" in dry(request_of(after="7"))


def test_the_jobs_own_environment_has_the_last_word(request_of, tmp_path, monkeypatch):
    monkeypatch.setattr(slurm, "submit", lambda *args: pytest.fail("submitted"))
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'sluice: no objective like that here' >&2; exit 2\n")
    python.chmod(0o755)
    cluster = write(tmp_path / "c.toml", python=str(python))
    with pytest.raises(ConfigError, match="in the job's environment: no objective like that here"):
        submit.submit(request_of(cluster=str(cluster)), dry_run=False)
    assert not (tmp_path / "run").exists()


def test_what_is_submitted_is_remembered(request_of, tmp_path, monkeypatch):
    monkeypatch.setattr(slurm, "submit", lambda options, script, environment: "42")
    monkeypatch.setattr(submit, "check_there", lambda draft, profile: None)
    given = request_of(nodes=2, time="50")
    assert "job 42; its log:" in submit.submit(given, dry_run=False)
    (entry,) = history.read(tmp_path / "run")
    assert isinstance(entry, Submitted)
    assert (entry.job, entry.cluster, entry.nodes, entry.time_limit) == ("42", "default", 2, "50")
    assert entry.command[:4] == ["submit", str(given.config), "--nodes", "2"] and entry.command[-2:] == ["--time", "50"]
    assert sorted(p.name for p in (tmp_path / "run" / "launch").iterdir()) == [
        "config-001.toml",
        "job-001.json",
        "jobs.jsonl",
    ]


def test_shards_are_prepared_by_an_array(tmp_path):
    words = ["table", "list-{task}.csv", str(tmp_path / "part-{task}")]
    config = write(tmp_path / "p.toml", prepare={"folder": str(tmp_path / "out"), "arguments": words})
    with pytest.raises(ConfigError, match="needs --array"):
        dry(Request(config))
    shown = dry(Request(config, array="0-99%8"))
    assert "--array=0-99%8" in shown and "slurm-%A-%a.out" in shown and "prepare.sbatch" in shown
    with pytest.raises(ConfigError, match="write it like 0-99"):
        dry(Request(config, array="0-x"))
    with pytest.raises(ConfigError, match=r"prepare\.argumens: unknown key \(did you mean 'arguments'"):
        dry(Request(write(tmp_path / "q.toml", prepare={"folder": "x", "argumens": []}), array="0-3"))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"partitoin": "x"}, "partitoin: unknown key (did you mean 'partition'?)"),
        ({"partition": "a b"}, "partition: "),
        ({"gpus_per_node": -1}, "gpus_per_node: "),
        ({"environment": {"A B": "x"}}, "environment"),
        ({"launcher": "sruns"}, "did you mean 'srun'"),
        ({"setup": "nowhere.sh"}, "setup: no file"),
    ],
)
def test_mistakes_in_a_profile(values, words, tmp_path):
    with pytest.raises(ConfigError) as caught:
        profile.load(str(write(tmp_path / "c.toml", **values)))
    assert words in str(caught.value)


def test_shipped_profiles_load():
    for path in profile.PROFILES.glob("*.toml"):
        profile.load(path.stem)


def test_without_slurm_the_message_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="squeue is not on this machine"):
        slurm.states(["7"])


def test_the_scripts_are_sound():
    import shutil

    if shutil.which("shellcheck") is None:
        pytest.skip("needs shellcheck")
    scripts = [str(p) for end in ("sbatch", "sh") for p in (ROOT / "slurm").glob(f"*.{end}")]
    done = subprocess.run(["shellcheck", "-x", "-P", str(ROOT / "slurm"), *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
