"""What a submission hands to SLURM, to the job and to those who look at it later, value for value."""

from __future__ import annotations

import json
import os

import pytest

from launch import history, profile, slurm, submit
from launch.decide import Budget
from launch.history import Submitted
from launch.job import Job
from launch.profile import Container, Profile
from launch.submit import Request
from pipeline.config import load, provenance
from pipeline.core.errors import ConfigError
from tests.unit.launch.test_submit import ROOT, dry, request_of, write  # noqa: F401


@pytest.fixture
def sbatch(monkeypatch):
    """Jobs that were submitted: options, script, environment. Numbers are counted from 41."""
    made = []

    def stand_in(options, script, environment):
        made.append((list(options), script.name, dict(environment)))
        return str(40 + len(made))

    monkeypatch.setattr(slurm, "submit", stand_in)
    monkeypatch.setattr(slurm, "states", lambda jobs: {})
    monkeypatch.setattr(submit, "check_there", lambda draft, profile: None)
    return made


def test_all_of_a_profile_reaches_the_job(request_of, tmp_path, sbatch):  # noqa: F811
    cluster = write(
        tmp_path / "c.toml",
        ranks_per_node=2,
        gpus_per_node=4,
        cpus_per_rank=3,
        environment={"A": "b c", "TMPDIR": "/mine"},
        scratch="/scratch",
        interface="ib0",
        launcher="deepspeed",
        stop_seconds=77,
        restarts=5,
        requeues=6,
        srun=["--label"],
        python="/opt/python",
    )
    submit.submit(request_of(nodes=2, cluster=str(cluster)), dry_run=False)
    notes = tmp_path / "run" / "launch"
    config, place = str(notes / "config-001.toml"), ["--procs", "2", "--nodes", "2", "--node-rank", "{node}"]
    job = Job.read(notes / "job-001.json")
    told = json.loads(job.environment[provenance.COMMAND])
    assert told["command"][:2] == ["sluice", "submit"] and told["folder"] == os.getcwd()
    assert job == Job(
        kind="pretrain",
        run=str(tmp_path / "run"),
        arguments=["-m", "launch", "train", config, *place, "--master", "{master}"],
        nodes=2,
        ranks_per_node=2,
        python=["/opt/python"],
        environment={"TMPDIR": "/mine", "A": "b c", provenance.COMMAND: job.environment[provenance.COMMAND]},
        srun=["--cpus-per-task=3", "--label"],
        interface="ib0",
        launcher="deepspeed",
        stop_seconds=77,
        budget=Budget(5, 6),
    )
    assert load.load_run(config).run.folder == str(tmp_path / "run")
    ((options, script, _),) = sbatch
    assert script == "pretrain.sbatch"
    assert {"--ntasks-per-node=2", "--gpus-per-node=4", "--signal=B:USR1@77", f"--chdir={os.getcwd()}"} <= set(options)


def test_a_second_submission_leaves_the_files_of_the_first(request_of, tmp_path, sbatch):  # noqa: F811
    submit.submit(request_of(), dry_run=False)
    notes = tmp_path / "run" / "launch"
    before = (notes / "config-001.toml").read_text(), (notes / "job-001.json").read_text()
    submit.submit(request_of("run.seed=99"), dry_run=False)
    assert before == ((notes / "config-001.toml").read_text(), (notes / "job-001.json").read_text())
    assert load.load_run(notes / "config-002.toml").run.seed == 99
    assert str(notes / "config-002.toml") in Job.read(notes / "job-002.json").arguments
    assert [environment["SLUICE_JOB"] for *_, environment in sbatch] == [f"{notes}/job-00{n}.json" for n in (1, 2)]


def test_what_submits_a_run_again_is_all_that_was_said(request_of, tmp_path, sbatch):  # noqa: F811
    cluster = str(write(tmp_path / "c.toml", partition="gpu"))
    given = request_of("run.seed=99", nodes=2, cluster=cluster, time="50", after="7")
    submit.submit(given, dry_run=False)
    (entry,) = history.read(tmp_path / "run")
    assert isinstance(entry, Submitted)
    settings = [word for override in given.overrides for word in ("--set", override)]
    assert "run.seed=99" in settings
    words = ["submit", str(given.config), "--nodes", "2", *settings, "--cluster", cluster, "--time", "50"]
    assert list(entry.command) == words  # not --after: that job is over by then


def test_shards_need_no_accelerator(tmp_path, sbatch):
    words = ["table", "list-{task}.csv", str(tmp_path / "part-{task}")]
    config = write(tmp_path / "p.toml", prepare={"folder": str(tmp_path / "out"), "arguments": words})
    cluster = write(tmp_path / "c.toml", gpus_per_node=4)
    submit.submit(Request(config, array="0-3", cluster=str(cluster)), dry_run=False)
    ((options, script, _),) = sbatch
    assert script == "prepare.sbatch" and "--ntasks-per-node=1" in options
    assert not [option for option in options if option.startswith("--gpus")]
    job = Job.read(tmp_path / "out" / "launch" / "job-001.json")
    assert job.run == f"{tmp_path}/out/task-{{task}}" and job.arguments == ["-m", "launch", "prep", "build", *words]


def test_a_job_knows_nothing_of_the_job_it_is_submitted_from(request_of, sbatch, monkeypatch):  # noqa: F811
    for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_CONF", "MY"):
        monkeypatch.setenv(name, "x")
    submit.submit(request_of(), dry_run=False)
    ((_, _, environment),) = sbatch
    assert {"SLURM_CONF", "MY", "SLUICE_HOME", "SLUICE_PYTHON"} <= set(environment)
    assert not {"SLURM_JOB_ID", "SLURM_NTASKS"} & set(environment)


def test_signs_that_slurm_would_replace(request_of, tmp_path):  # noqa: F811
    folder = tmp_path / "50% of $it, j"
    shown = dry(request_of(f"run.folder='{folder}'"))
    assert "--job-name=sluice-50__of__it__j" in shown
    assert f"{tmp_path}/50%% of $it, j/launch/slurm-%j.out" in shown


def test_ranks_of_a_node_and_their_python():
    assert (Profile().ranks, Profile(gpus_per_node=4).ranks) == (1, 4)
    assert Profile(gpus_per_node=4, ranks_per_node=2).ranks == 2
    assert Profile(python="/p").rank_python == ["/p"]
    inside = Profile(python="/p", container=Container(command=("run", "x.sif")))
    assert inside.rank_python == ["run", "x.sif", "python3"] and inside.host_python == "/p"


def test_a_setup_file_lies_beside_its_profile(tmp_path, monkeypatch):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "setup.sh").touch()
    path = write(tmp_path / "site" / "c.toml", setup="setup.sh")
    monkeypatch.chdir("/")
    assert profile.load(str(path)) == ("c", Profile(setup=str(tmp_path / "site" / "setup.sh")))


def test_the_number_of_a_job_is_all_that_is_kept_of_what_sbatch_says(tmp_path, monkeypatch):
    (tmp_path / "sbatch").write_text('#!/bin/sh\necho "a word from the site"; echo "42;cluster"; echo "$@" >&2\n')
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert slurm.submit(["--nodes=1"], tmp_path / "x.sbatch", dict(os.environ)) == "42"


def test_a_history_that_a_later_version_wrote_is_read(tmp_path):
    entry = Submitted("t", "7", "x", 1, None, "c", ["submit"])
    history.append(tmp_path, entry)
    path = tmp_path / history.FOLDER / history.FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"new": 1}) + "\n")
    assert history.read(tmp_path) == [entry]


def test_a_profile_that_is_no_toml_is_a_message(tmp_path):
    (tmp_path / "p.toml").write_text("partition = [")
    with pytest.raises(ConfigError, match=rf"cannot read the cluster profile {tmp_path}/p.toml: "):
        profile.load(str(tmp_path / "p.toml"))


def test_what_would_change_a_submission_behind_its_back_stays_here(monkeypatch):
    """What says which SLURM, who pays and where jobs run by habit goes along; the shape of the job is the plan's."""
    kept = {"SLURM_CONF": "/etc/s", "SBATCH_ACCOUNT": "mine", "SBATCH_PARTITION": "big", "HOME_OF_DATA": "x"}
    lost = {
        **{"SBATCH_EXPORT": "NONE", "SBATCH_WAIT": "1", "SBATCH_ARRAY_INX": "0-9", "SBATCH_REQUEUE": "0"},
        **{"SBATCH_MEM_PER_NODE": "1", "SBATCH_GET_USER_ENV": "1", "SBATCH_SIGNAL": "KILL@1", "SBATCH_OPEN_MODE": "t"},
        **{"SLURM_NTASKS": "7", "SLURM_EXPORT_ENV": "NONE", "SRUN_CPUS_PER_TASK": "9", "SALLOC_PARTITION": "x"},
    }
    for name, value in (kept | lost).items():
        monkeypatch.setenv(name, value)
    found = slurm.submission(os.environ)
    assert kept.items() <= found.items() and not lost.keys() & found.keys()


def test_a_question_is_answered_whole(tmp_path, monkeypatch):
    """Filters and formats of the user's own would hide jobs, and a command that asks back would wait for ever."""
    command = tmp_path / "squeue"
    command.write_text("#!/bin/sh\nenv\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("SQUEUE_STATES", "SQUEUE_PARTITION", "SCANCEL_INTERACTIVE", "SINFO_PARTITION"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    said = slurm.call("squeue").splitlines()
    assert not [line for line in said if line.startswith(("SQUEUE_", "SCANCEL_", "SINFO_"))]
    assert {"SLURM_TIME_FORMAT=standard", "SLURM_JOB_ID=7"} <= set(said)


@pytest.mark.parametrize(
    ("nodes", "names"),
    [
        ("n1", ["n1"]),
        ("n[1-2,07-09],m3", ["n1", "n2", "n07", "n08", "n09", "m3"]),
        ("r[1-2]n[3,5]", ["r1n3", "r1n5", "r2n3", "r2n5"]),
        ("a,b-c[9-10]-x", ["a", "b-c9-x", "b-c10-x"]),
    ],
)
def test_nodes_are_known_without_scontrol(nodes, names, monkeypatch):
    monkeypatch.setenv("PATH", "/none")
    assert slurm.node_names(nodes) == names


def test_a_command_that_is_not_there_is_not_waited_for(monkeypatch):
    monkeypatch.setenv("PATH", "/none")
    monkeypatch.setattr(slurm.time, "sleep", lambda seconds: pytest.fail("it waits"))
    with pytest.raises(slurm.MissingCommand, match="scontrol is not on this machine; submit from a login node"):
        slurm.patiently(lambda: slurm.facts("7"))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(slurm.MissingCommand, match="scontrol is not in this job; its nodes need"):
        slurm.patiently(lambda: slurm.facts("7"))
