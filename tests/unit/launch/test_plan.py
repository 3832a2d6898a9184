import re
import sys
from pathlib import Path

import pytest

from launch import cli
from launch.plan import size

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
        (["shards"], "of a data set: --global-batch"),
        (["shards", "--global-batch", "8", "--set", "run.seed=1"], "of a data set: --global-batch"),
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


@pytest.mark.parametrize(("number", "text"), [(999, "999 B"), (1500, "1.5 kB"), (2.5e9, "2.5 GB"), (3e12, "3 TB")])
def test_sizes(number, text):
    assert size(number) == text
