"""How a rank ends: one message, one exit code, in the rank's own log and on the console under its number."""

from __future__ import annotations

import errno
import os

import pytest

from pipeline.core.errors import ConfigError, DataError, NonFiniteError
from pipeline.record.logs import log_path, log_ranks
from pipeline.run.__main__ import guarded, main
from tests.integration.runs import SMOKE
from tests.ranks import start_ranks

ROOM = "; make room and start again to resume\n"


@pytest.mark.parametrize(
    ("rank", "error", "code", "said"),
    [
        (0, ConfigError("mend it"), 2, "sluice: mend it\n"),
        (3, ConfigError("mend it"), 2, ""),  # every rank has it, and the first one says so
        (3, DataError("lost"), 2, "sluice: rank 3: lost\n"),
        (0, NonFiniteError("nan"), 70, "sluice: nan\n"),
        (1, OSError(errno.ENOSPC, "full", "/o/x"), 2, f"sluice: rank 1: full (/o/x){ROOM}"),
        (1, OSError(errno.EDQUOT, "quota"), 2, f"sluice: rank 1: quota{ROOM}"),
    ],
)
def test_what_the_user_can_mend_is_one_message(rank, error, code, said, monkeypatch, capsys):
    def fail() -> int:
        raise error

    monkeypatch.setenv("RANK", str(rank))
    assert guarded(fail) == code
    assert capsys.readouterr() == ("", said)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_folder_of_somebody_elses_is_no_traceback(number, capsys):
    def fail() -> int:
        raise OSError(number, os.strerror(number), "/theirs/results.json")

    assert guarded(fail) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"sluice: {os.strerror(number)} (/theirs/results.json)") and "name another folder" in said


def test_a_full_disk_says_what_is_full(tmp_path, capsys):
    def fail() -> int:
        raise OSError(errno.ENOSPC, "full", str(tmp_path / "x"))

    assert guarded(fail) == 2
    assert f"full ({tmp_path}/x): the disk at / has " in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("odd"), OSError(errno.EIO, "odd")])
def test_what_only_a_bug_can_cause_has_a_traceback_on_any_rank(error, monkeypatch, capsys):
    def fail() -> int:
        raise error

    monkeypatch.setenv("RANK", "3")
    assert guarded(fail) == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and said.endswith("odd\n")


def test_a_rank_has_a_log_of_its_own_and_its_errors_are_on_the_console_too(tmp_path):
    """Ranks of two nodes have the same local number."""
    (done,) = start_ranks(1, fifth_rank, folder=tmp_path / "run", console=tmp_path / "console")
    message = "sluice: rank 5: RANK is set but WORLD_SIZE, MASTER_ADDR"
    assert done.value == 2 and log_ranks(tmp_path / "run") == [5]
    said = (tmp_path / "console").read_text().splitlines()
    assert [line.startswith(f"rank 5 | {message}") for line in said] == [True]
    assert message in log_path(tmp_path / "run", 5).read_text()


def fifth_rank(folder, console):
    """A rank of which its launcher has not said all; its standard error goes to a file."""
    with open(console, "w") as file:
        os.dup2(file.fileno(), 2)
    del os.environ["WORLD_SIZE"], os.environ["MASTER_ADDR"]
    os.environ |= {"RANK": "5", "LOCAL_RANK": "1"}
    return main(["train", "--config", str(SMOKE / "mae.toml"), "--set", f"run.folder='{folder}'"])
