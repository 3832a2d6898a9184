import re
import sys
from pathlib import Path

import pytest

from launch import cli, plan
from launch.plan import cost_rows, plan_data, reading_rows, size
from pipeline.config.load import load_run
from pipeline.core.errors import ConfigError
from pipeline.core.manifest import Manifest, Shard
from pipeline.data.forecast import Forecast

ROOT = Path(__file__).parents[3]
SMOKE = str(ROOT / "configs" / "smoke" / "mae.toml")


@pytest.fixture
def sluice(monkeypatch, capfd):
    """Exit code, output and messages of `sluice plan`, run in this process."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["sluice", "plan", *words])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return caught.value.code or 0, *capfd.readouterr()

    return run


def rows(text):
    return dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in text.splitlines())


def test_a_run(sluice, glyphs):
    shape = ["--nodes", "2", "--gpus-per-node", "2", "--images-per-second", "4"]
    settings = ["--set", f"data.train='{glyphs}/train'", "--set", "engine.micro_batch=1"]
    code, out, err = sluice(SMOKE, *shape, *settings)
    assert code == 0, err
    found = rows(out)
    assert found["global batch"] == "8 = 4 ranks x 1 samples x 2 accumulated"
    assert found["parameters"].startswith("38,800 trained, 544 frozen")
    assert found["weights"] == "157 kB"  # (38,800 + 544) * 4
    assert found["master weights"] == found["gradients"] == "38.8 kB"  # a quarter
    assert found["optimizer"] == "77.6 kB"
    assert found["activations"].endswith("(estimate, micro-batch of 1)")
    assert found["wire"].startswith("349 kB")  # 3/4 of 2 * 155,200 + 155,200
    assert found["checkpoint"].startswith("468 kB")  # 3 * 155,200 + 2,176
    assert found["wall time"].startswith("16 s at 4 images/s")
    assert found["reading"].endswith("at 4 images/s")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([SMOKE, "--global-batch", "8"], "says its own batch"),
        (["shards"], "a data set needs --global-batch"),
        (["shards", "--global-batch", "8", "--set", "run.seed=1"], "a data set needs --global-batch"),
        ([SMOKE, "--set", "data.train=nowhere"], "nowhere"),
        (["none.toml"], "none.toml"),
    ],
)
def test_a_mistake(sluice, words, message):
    code, _, err = sluice(*words)
    assert code == 2 and message in err and "Traceback" not in err


def test_a_batch_that_does_not_divide(sluice, glyphs):
    code, _, err = sluice(SMOKE, "--gpus-per-node", "3", "--set", f"data.train='{glyphs}/train'")
    assert code == 2 and "cannot be shared out to 3 rank(s)" in err


def test_a_model_that_cannot_be_built_has_said_so_itself(sluice, glyphs, monkeypatch):
    monkeypatch.setattr(plan, "run_command", lambda arguments: ["sh", "-c", "echo sluice: mend it >&2; exit 2"])
    assert sluice(SMOKE, "--gpus-per-node", "2", "--set", f"data.train='{glyphs}/train'") == (
        2,
        "",
        "sluice: mend it\n",
    )


def test_memory_is_the_sum_of_its_parts_and_what_is_not_there_is_not_shown():
    state = {"weights": 4_000_000, "gradients": 1_000_000, "optimizer": 2_000_000, "master": 1_000_000, "ema": 0}
    work = {"activations": 7_000_000, "gathered": 0, "sent": None, "checkpoint": 12_000_000}
    config = load_run(SMOKE, ["run.keep=4"])
    found = cost_rows({"trained": 1_000_000, "frozen": 0, **state, **work}, config, 4)
    assert found["parameters"] == "1,000,000 trained"
    assert found["memory per GPU"].startswith("15 MB,")
    shown = [name.strip() for name in found if name.startswith("  ")]
    assert shown == ["weights", "master weights", "gradients", "optimizer", "activations"]
    assert found["wire"] == "not estimated under ZeRO 3, for gradients and parameters, 4 ranks"
    assert found["checkpoint"] == "12 MB, 4 are kept"


def test_what_is_read_by_each_of_two_nodes():
    data = Manifest("x", tuple(Shard(f"{i}.tar", 10, 1, "0" * 64) for i in range(16)), {"image": ("jpg",)})
    found = Forecast(
        lanes=8,
        steps_per_epoch=5.0,
        left_over=0,
        batches_per_rank=5,
        shards_per_node=(3, 5),
        open_per_rank=2,
        open_per_node=4,
        shards_in_batch=6.8,
        gigabytes_per_node=1.5,
        bytes_per_sample=100_000.0,
    )
    assert reading_rows(found, data, 2, 1000.0) == {
        "lanes": "8, 2.0 shards each",
        "shards per node": "3 to 5 in an epoch, 1.5 GB",
        "open shards": "at most 2 per rank, 4 per node",
        "mixing": "7 different shards in a micro-batch",
        "reading": "50.0 MB/s per node at 1,000 images/s",
    }


def test_lanes_that_do_not_divide_the_batch(glyphs):
    shape = {"nodes": 1, "procs": 1, "micro_batch": None, "window": 4, "images_per_second": 1.0}
    with pytest.raises(ConfigError, match="3 lanes do not divide a global batch of 8"):
        plan_data(f"{glyphs}/train", global_batch=8, lanes=3, **shape)


@pytest.mark.parametrize(
    ("number", "text"), [(999, "999 B"), (1000, "1 kB"), (1500, "1.5 kB"), (2.5e9, "2.5 GB"), (3e12, "3 TB")]
)
def test_sizes(number, text):
    assert size(number) == text
