import io
import json
import math
import sys
from contextlib import closing

import numpy as np
import pytest
from PIL import Image

from pipeline.core.protocols import Picture
from pipeline.record.files import read_lines
from pipeline.record.metrics import read_metrics
from pipeline.record.progress import Bar, Plain, TimeLeft, facts, progress
from pipeline.record.recorder import Recorder
from pipeline.record.showcase import read_pictures, save_pictures


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_time_left_follows_the_recent_speed():
    clock = Clock()
    left = TimeLeft(1000, clock)
    assert left.update(0) == ""
    for step in range(10, 300, 10):  # 1 s a step, then 2 s
        clock.now += 10 if step < 100 else 20
        text = left.update(step)
    assert text == "23 m 40 s left"  # 710 steps at 2 s, the slow steps alone
    assert left.update(1000) == ""


def test_facts_are_those_that_are_there():
    assert facts({"loss": 0.43121, "samples_per_second": 1234.0, "data_wait": 0.031}) == (
        "loss 0.4312  1.23k samples/s  data wait 3%"
    )
    assert facts({"loss": math.nan}) == "loss nan"


def test_plain_lines_keep_their_distance_and_the_last_is_always_shown():
    clock, stream = Clock(), io.StringIO()
    shown = progress(100, stream, clock)
    assert isinstance(shown, Plain)
    for step in range(1, 9):
        shown.update(step, {"loss": 1.0})
        clock.now += 2
    shown.close()
    assert [line.split("/")[0] for line in stream.getvalue().splitlines()] == ["step 1", "step 4", "step 7", "step 8"]
    assert "step 4/100  loss 1  3 m 12 s left\n" in stream.getvalue()


def test_the_end_of_the_run_is_shown_at_once_and_once():
    stream = io.StringIO()
    shown = progress(2, stream, Clock())
    for step in (1, 2):
        shown.update(step, {})
    assert stream.getvalue() == "step 1/2\nstep 2/2\n"
    shown.close()
    assert stream.getvalue() == "step 1/2\nstep 2/2\n"


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    shown = progress(2000, stream)
    assert isinstance(shown, Bar)
    shown.update(1000, {"loss": 0.5})
    shown.note("passed over [red]x[/red]")
    shown.close()
    text = stream.getvalue()
    assert "step 1,000/2,000" in text and "loss 0.5" in text and "passed over [red]x[/red]" in text


def test_pictures_are_found_again_by_step(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    save_pictures(tmp_path, 20, {"b": Picture(image, "two\n<b>"), "a": Picture(image, "one")})
    save_pictures(tmp_path, 3, {"a": Picture(image, "old")})
    save_pictures(tmp_path, 3, {"a": Picture(255 - image, "new")})
    (tmp_path / "showcase" / "step-00000099").mkdir()  # killed before its index was written
    found = read_pictures(tmp_path)
    assert {step: [(s.name, s.caption) for s in shots] for step, shots in found.items()} == {
        3: [("a", "new")],
        20: [("b", "two\n<b>"), ("a", "one")],
    }
    assert found[20][0].path == tmp_path / "showcase" / "step-00000020" / "b.png"
    with Image.open(found[3][0].path) as read:
        assert np.array_equal(np.asarray(read), 255 - image)


@pytest.mark.parametrize("name", ["../a", "a/b", "", ".a"])
def test_a_picture_cannot_leave_its_folder(tmp_path, name):
    with pytest.raises(AssertionError):
        save_pictures(tmp_path, 1, {name: Picture(np.zeros((2, 2, 3), np.uint8), "")})


def board(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


def test_a_run_that_is_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stderr := io.StringIO())
    picture = Picture(np.full((4, 4, 3), 200, np.uint8), "grey")
    with closing(Recorder(tmp_path, total_steps=4, config="seed = 1")) as recorder:
        for step in (1, 2, 3):
            recorder.log(step, {"samples": 8 * step, "loss": 1.0 / step, "data_digest": "0f"})
    with closing(Recorder(tmp_path, total_steps=4, attempt=1, step=2, config="seed = 1")) as recorder:
        recorder.note("resumed")
        for step in (3, 4):
            recorder.log(step, {"samples": 8 * step, "loss": 2.0 * step, "data_digest": "0e"})
        recorder.pictures(4, {"grid": picture})

    rows = read_metrics(tmp_path)
    assert [r["loss"] for r in rows] == [1.0, 0.5, 6.0, 8.0]
    assert rows[2] == {"step": 3, "samples": 24, "loss": 6.0, "data_digest": "0e", "attempt": 1}
    assert "resumed" in stderr.getvalue() and "step 4/4" in stderr.getvalue()
    (note,), _ = read_lines(tmp_path / "notes.jsonl")
    assert (note["attempt"], note["text"]) == (1, "resumed")
    assert list(json.loads((tmp_path / "showcase" / "step-00000004" / "index.json").read_text())) == ["grid"]

    events = board(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 0.5), (3, 6.0), (4, 8.0)]
    assert sorted(events.Tags()["scalars"]) == ["loss", "samples"]
    assert events.Tags()["images"] == ["showcase/grid"]
    assert b"seed = 1" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


def test_steps_are_not_doubled_though_nobody_knows_of_the_earlier_start(tmp_path, monkeypatch):
    """As when state.json is gone: the attempt is 0 again."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    for step in (0, 2):
        with closing(Recorder(tmp_path, total_steps=4, step=step)) as recorder:
            for at in range(step + 1, 4):
                recorder.log(at, {"loss": float(at + step)})
    assert [(e.step, e.value) for e in board(tmp_path).Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 5.0)]
