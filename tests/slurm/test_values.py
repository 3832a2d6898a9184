"""Whatever stands in a configuration, a path or a profile reaches the ranks as it is, and no shell looks into it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import tomli_w
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from launch import history, submit
from launch.profile import HOME
from pipeline.config import load
from tests.integration.runs import SMOKE
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import environment, profile

CANARY = "sluice-canary"
NASTY = [
    f"$(touch {CANARY})",
    f"`touch {CANARY}`",
    f"; touch {CANARY} ;",
    f"'; touch {CANARY}; '",
    f'"; touch {CANARY}; "',
    f"a\ntouch {CANARY}\n",
    f"| touch {CANARY} & #",
    "a b\t'c' \"d\" \\e $HOME ${PATH} ~ * ? [a] {1..3} !! %j %% \u00e9 \u6f22",
    "a,b=c,--export=NONE",
    "-",
    "--wrap=touch",
]
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=40)
SEVERAL = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In place of Python: writes its arguments, each with a NUL behind it."""
    path = tmp_path_factory.mktemp("recorder") / "python"
    path.write_text('#!/bin/bash\nprintf "%s\\0" "$@" >"$SLUICE_TEST_RECORD"\n')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("script", ["pretrain", "evaluate", "prepare"])
@SEVERAL
@given(name=TEXT, value=TEXT)
@example(name=NASTY[0], value=NASTY[5])
@example(name=NASTY[3], value=NASTY[7])
def test_the_scripts_look_into_no_value(script, recorder, tmp_path, name, value):
    file = tmp_path / "record"
    told = {
        "SLUICE_HOME": str(HOME),
        "SLUICE_PYTHON": str(recorder),
        "SLUICE_JOB": name,
        "SLUICE_SETUP": "",
        "SLUICE_MODULES": "",
        "SLUICE_TEST_RECORD": str(file),
        "PYTHONPATH": value,
        "PATH": os.environ["PATH"],
    }
    subprocess.run(["bash", str(HOME / "slurm" / f"{script}.sbatch")], env=told, cwd=tmp_path, check=True, timeout=60)
    assert file.read_bytes().decode() == f"-m\0launch.agent\0{name}\0"
    assert [p.name for p in tmp_path.iterdir()] == ["record"]


@SEVERAL
@given(value=TEXT.filter(lambda text: not text.startswith("~")))  # which no folder may be called
@example(value=NASTY[5])
@example(value=NASTY[7])
def test_a_configuration_survives_its_copy(value, tmp_path):
    text = tomli_w.dumps({"run": {"folder": value}, "data": {"train": value}})
    (tmp_path / "given.toml").write_text(f'base = ["{SMOKE}/mae.toml"]\n{text}', encoding="utf-8")
    config = load.load_run(tmp_path / "given.toml")
    (tmp_path / "copy.toml").write_text(load.dump(config), encoding="utf-8")
    assert load.load_run(tmp_path / "copy.toml") == config
    assert config.run.folder == config.data.train == value


@pytest.mark.slurm
def test_real_jobs_get_every_value_as_it_is(cluster: Cluster, glyphs: Path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(submit, "PROGRAM", "tests.slurm.recorder")
    monkeypatch.setattr(submit, "check_there", lambda draft, profile: None)
    jobs = []
    old = os.umask(0o027)
    try:
        for number, value in enumerate(NASTY):
            record = tmp_path / f"record-{number}"
            folder = tmp_path / "runs" / f"{value}{number}".replace("/", "").replace("\\", "")
            told = {"SLUICE_TEST_RECORD": str(record), "SLUICE_TEST_VALUE": value}
            place = profile(tmp_path / "profiles" / f"p{number}.toml", environment=told)
            config = tmp_path / "run.toml"
            values = {"run": {"folder": str(folder)}, "data": {"train": str(glyphs / "train")}}
            config.write_text(f'base = ["{SMOKE}/supervised.toml"]\n{tomli_w.dumps(values)}', encoding="utf-8")
            with environment(cluster):
                submit.submit(submit.Request(config, nodes=1, cluster=str(place)), dry_run=False)
            jobs.append((folder, record, value))
    finally:
        os.umask(old)
    for folder, record, value in jobs:
        job = history.last_job(folder)
        assert cluster.wait_state(str(job), "COMPLETED", "FAILED", seconds=240) == "COMPLETED", value
        found = json.loads(Path(f"{record}0").read_text())
        assert found["arguments"] == ["train", "--config", str(folder / "launch" / "config-001.toml")]
        assert found["environment"]["SLUICE_TEST_VALUE"] == value
        assert found["umask"] == 0o027 and found["folder"] == str(tmp_path)
        assert load.load_run(folder / "launch" / "config-001.toml").run.folder == str(folder)
        written = [folder, *(folder / "launch").iterdir()]
        assert len(written) > 3 and not any(p.stat().st_mode & 0o007 for p in written), "others may read it"
    assert not list(tmp_path.rglob(f"{CANARY}"))
    assert not (Path.cwd() / CANARY).exists()
