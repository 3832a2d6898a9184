"""Curves in other programs: each step once, whatever became of the starts before; without a network."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.load import load_run
from pipeline.config.mistakes import Mistakes
from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Picture
from pipeline.record import logger
from pipeline.record.files import read_lines
from pipeline.record.logger import check_loggers
from pipeline.record.metrics import read_metrics
from pipeline.record.recorder import Recorder

ROOT = Path(__file__).parents[3]
SMOKE = ROOT / "configs" / "smoke" / "mae.toml"
CONFIG = '[optimizer]\nlr = 0.001\n\n[run]\nfolder = "x"\n'
PICTURE = Picture(np.full((4, 4, 3), 200, np.uint8), "grey")
Curve = list[tuple[int, float]]


def wandb_records(file: Path) -> Iterator[bytes]:
    """Of an offline run: LevelDB's log format (its doc/log_format.md) after seven bytes of its own."""
    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        whole = (b"" if kind in (1, 2) else whole) + data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield whole


def wandb_curve(folder: Path, name: str) -> Curve:
    """What the one offline run holds."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    curve = []
    for data in wandb_records(file):
        record = Record()
        record.ParseFromString(data)
        items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
        if name in items:
            curve.append((json.loads(items["_step"]), float(json.loads(items[name]))))
    return curve


def mlflow_curve(folder: Path, name: str) -> Curve:
    """What the one run that is not deleted holds."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=(folder / "mlruns").as_uri())
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert run.data.params["optimizer.lr"] == "0.001"
    return [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)]


def tensorboard_curve(folder: Path, name: str) -> Curve:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


READERS: dict[str, Callable[[Path, str], Curve]] = {
    "tensorboard": tensorboard_curve,
    "wandb": wandb_curve,
    "mlflow": mlflow_curve,
}


def installed(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"needs {name}, of the extra [{name}]")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, and nothing of the user's."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")


def part(folder: Path, name: str, attempt: int, first: int, last: int, finished: bool = True) -> None:
    """One start: from after a step to another one."""
    recorder = Recorder(folder, total_steps=9, attempt=attempt, step=first, config=CONFIG, loggers=[name])
    for step in range(first + 1, last + 1):
        recorder.log(step, {"loss": attempt + 1 / step, "knn/top1": 0.5, "data_digest": "0f"})
        if step == 2:
            recorder.pictures(step, {"grid": PICTURE})
    if finished:
        recorder.close()


@pytest.mark.parametrize("name", READERS)
def test_a_resumed_run_goes_on_without_doubled_steps(tmp_path, name):
    """It went on from step 3 after 5, and from step 4 after 4: as metrics.jsonl has it, which is the judge."""
    installed(name)
    for attempt, (first, last) in enumerate([(0, 5), (3, 4), (4, 6)]):
        part(tmp_path, name, attempt, first, last)
    curve = READERS[name](tmp_path, "loss")
    assert [step for step, _ in curve] == [1, 2, 3, 4, 5, 6]
    rows = read_metrics(tmp_path)
    assert [value for _, value in curve] == pytest.approx([row["loss"] for row in rows], rel=1e-6)
    assert [attempt + 1 / step for attempt, step in zip([0, 0, 0, 1, 2, 2], range(1, 7), strict=True)] == [
        row["loss"] for row in rows
    ]
    assert [step for step, _ in READERS[name](tmp_path, "knn/top1")] == [1, 2, 3, 4, 5, 6]
    assert not read_lines(tmp_path / "notes.jsonl")[0]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_killed_start_leaves_nothing_twice(tmp_path, name):
    """A real SIGKILL, by itself, with steps that were not saved; and pictures of before are there still."""
    installed(name)
    code = (
        "import os, signal, sys; from pathlib import Path; from tests.unit.record.test_loggers import part\n"
        "part(Path(sys.argv[1]), sys.argv[2], 0, 0, 5, False); os.kill(os.getpid(), signal.SIGKILL)"
    )
    shared = {"WANDB_SERVICE"}  # of this process: a run starts a service of its own
    environment = {key: value for key, value in os.environ.items() if key not in shared} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(tmp_path), name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == -9, done.stderr
    part(tmp_path, name, 1, 3, 6)
    assert [step for step, _ in READERS[name](tmp_path, "loss")] == [1, 2, 3, 4, 5, 6]
    assert len(list((tmp_path / ("wandb" if name == "wandb" else "mlruns")).rglob("*grid*.png"))) >= 1


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_numbers_that_are_not_finite(tmp_path, name):
    installed(name)
    with closing(Recorder(tmp_path, total_steps=2, config=CONFIG, loggers=[name])) as recorder:
        recorder.log(1, {"loss": math.inf})
        recorder.log(2, {"loss": 1.0})
    assert READERS[name](tmp_path, "loss")[-1] == (2, 1.0) and not read_lines(tmp_path / "notes.jsonl")[0]


def test_a_logger_that_fails_is_told_and_the_run_goes_on(tmp_path, monkeypatch):
    class Broken(logger.Logger):
        def __init__(self, begun: logger.Begun) -> None:
            pass

        def scalars(self, step, values):
            if step == 2:
                raise RuntimeError("service is gone")

        picture = close = scalars

    monkeypatch.setattr("pipeline.record.recorder.make_logger", lambda name, begun: Broken(begun))
    with closing(Recorder(tmp_path, total_steps=3, loggers=["wandb"])) as recorder:
        for step in (1, 2, 3):
            recorder.log(step, {"loss": 1.0})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    (note,) = read_lines(tmp_path / "notes.jsonl")[0]
    assert "the logger wandb has failed" in note["text"] and "service is gone" in note["text"]


def test_what_is_not_installed_is_said_with_the_way_to_install_it(monkeypatch):
    monkeypatch.setattr(logger.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"record.loggers: \"wandb\" needs the package wandb.*pip install 'sluice\[wandb\]'"
    ):
        check_loggers(["wandb"])
    check_loggers([])


@pytest.mark.parametrize(
    ("value", "message"),
    [("['wanbd']", r"did you mean 'wandb'\?"), ("['wandb', 'wandb']", "stands twice"), ("'wandb'", "expected a list")],
)
def test_loggers_that_there_are_not(value, message):
    with pytest.raises(Mistakes, match=message):
        load_run(SMOKE, [f"record.loggers={value}"])


def test_nothing_is_imported_that_was_not_asked_for():
    modules = "pipeline.record.recorder, pipeline.record.loggers.wandb, pipeline.record.loggers.mlflow"
    code = f"import sys, {modules}; print(sorted({{'wandb', 'mlflow'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
