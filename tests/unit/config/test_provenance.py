import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import provenance
from pipeline.config.changes import Change
from pipeline.config.load import dump, load_run
from pipeline.config.resolve import resolve

RUN = """
run = {folder = "runs/x", length = "2ep", global_batch = 8}
data = {train = "shards"}
objective = {name = "mae"}
optimizer = {lr = 1e-3}
engine = {name = "accelerate", micro_batch = 4}
"""


@pytest.fixture
def started(tmp_path):
    """A configuration and its plan, and the run's folder."""
    (tmp_path / "run.toml").write_text(RUN)
    config = load_run(tmp_path / "run.toml")
    folder = tmp_path / "run"
    folder.mkdir()
    return folder, config, resolve(config, samples=100, world_size=2)


def git(folder, *arguments):
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    """A repository with one committed file."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "__init__.py").write_text("a = 1\n")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    return folder


def test_what_is_written(started, monkeypatch):
    folder, _, plan = started
    monkeypatch.delenv(provenance.COMMAND, raising=False)
    monkeypatch.setattr(sys, "argv", ["run.py", "train", "--config", "a b.toml"])
    monkeypatch.setattr(provenance, "code_state", lambda source: ("abc", b"+ change\n"))
    provenance.write(folder, plan)
    facts = json.loads((folder / "provenance.json").read_text())
    assert facts["command"] == ["run.py", "train", "--config", "a b.toml"]
    assert (facts["world_size"], facts["plan"]["total_steps"], facts["earlier"]) == (2, 24, [])
    assert facts["versions"]["torch"].startswith("2.")
    diff = f"code-{hashlib.sha256(b'+ change' + bytes([10])).hexdigest()[:12]}.diff"
    assert facts["git"] == {"commit": "abc", "dirty": True, "diff": diff}
    assert (folder / diff).read_bytes() == b"+ change\n"


def test_the_command_that_a_person_gave_is_kept(started, monkeypatch):
    folder, _, plan = started
    monkeypatch.chdir(folder)
    monkeypatch.setenv(*next(iter(provenance.command_variable(["sluice", "train", "a b.toml"]).items())))
    monkeypatch.chdir("/")
    provenance.write(folder, plan)
    facts = provenance.read(folder)
    assert (facts["command"], facts["folder"]) == (["sluice", "train", "a b.toml"], str(folder))


@pytest.mark.parametrize("told", ["", "[]", "{", '{"command": ["x"]}'])
def test_a_variable_that_says_something_else_is_not_believed(told, monkeypatch):
    monkeypatch.setenv(provenance.COMMAND, told)
    assert provenance.command()["command"] == sys.argv


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"null"])
def test_what_is_damaged_is_as_if_nothing_was_written(started, content):
    folder, _, plan = started
    (folder / "provenance.json").write_bytes(content)
    assert provenance.read(folder) == {}
    provenance.write(folder, plan)
    assert provenance.read(folder)["earlier"] == []


def test_the_configuration_is_what_is_trained_and_changes_have_their_step(started):
    folder, config, plan = started
    provenance.write(folder, plan)
    assert not (folder / "config.toml").exists(), "nothing is trained yet"
    provenance.train_on(folder, config, 0, [])
    assert load_run(folder / "config.toml") == config
    kept = []
    for step, now in ((10, 2.0), (20, 3.0), (20, 4.0), (15, 5.0)):
        other = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"lr": now})})
        provenance.write(folder, plan)
        provenance.train_on(folder, other, step, [Change("optimizer.lr", 1.0, now, "course")])
        kept.append([change["step"] for change in provenance.read(folder)["changes"]])
    assert kept == [[10], [10, 20], [10, 20], [10, 15]], "what was given up is no longer told"
    facts = provenance.read(folder)
    assert [(c["step"], c["settings"]) for c in facts["changes"]] == [
        (10, {"optimizer.lr": {"before": 1.0, "now": 2.0}}),
        (15, {"optimizer.lr": {"before": 1.0, "now": 5.0}}),
    ]
    assert load_run(folder / "config.toml").optimizer.lr == 5.0
    assert len(facts["earlier"]) == 4


def test_starting_again_keeps_the_earlier_starts(started):
    folder, _, plan = started
    for _ in range(3):
        provenance.write(folder, plan)
    facts = provenance.read(folder)
    assert len(facts["earlier"]) == 2
    assert all("earlier" not in start for start in facts["earlier"])


def test_state_of_a_checkout(checkout):
    commit = git(checkout, "rev-parse", "HEAD")
    assert provenance.code_state(checkout) == (commit, b"")
    (checkout / "__init__.py").write_text("a = 2\n")
    found, diff = provenance.code_state(checkout)
    assert found == commit
    assert b"-a = 1\n+a = 2\n" in diff


def test_installed_code_has_no_commit_though_it_lies_inside_a_checkout(checkout):
    site = checkout / "site-packages"
    site.mkdir()
    (site / "__init__.py").touch()
    assert provenance.code_state(site) == (None, b"")


def test_no_git(checkout, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert provenance.code_state(checkout) == (None, b"")


def test_package_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGES", ("torch", "no-such-package"))
    assert provenance.versions()["no-such-package"] is None


def test_a_configuration_that_was_written_and_read_again_has_the_same_digest(tmp_path):
    """So a failure at one step is known for the same one, given by its file or by the run."""
    smoke = Path(__file__).parents[3] / "configs" / "smoke" / "mae.toml"
    config = load_run(smoke)
    copy = tmp_path / "copy.toml"
    copy.write_text(dump(config))
    assert provenance.digest(load_run(copy)) == provenance.digest(config)
    assert provenance.digest(load_run(copy, ["optimizer.lr=2e-3"])) != provenance.digest(config)
