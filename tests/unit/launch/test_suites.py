"""Suites by name, and what there is of them, told without a framework."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from launch.evaluate import Wish, arguments_of, validate
from launch.suites import find_suite, listing
from pipeline.core import registry
from pipeline.core.errors import ConfigError

ROOT = Path(__file__).parents[3]
SUITE = """# Mine.
[data.one]
train = "a"
val = "b"
[[evals]]
name = "knn"
on = ["one"]
k = [7]
[groups.all]
metrics = ["knn/*"]
average = "macro"
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "mine.toml").write_text(SUITE)
    (tmp_path / "broken.toml").write_text("[")
    return tmp_path


def test_every_suite_and_evaluation_is_listed_with_its_settings(own):
    text = listing([own])
    lines = text.splitlines()
    assert (
        f"  mine  ({own}/mine.toml)" in lines and "    knn on one (k = [7])" in lines and "    averages: all" in lines
    )
    assert any(line.startswith("    cannot be read: ") for line in lines)
    assert any(line.startswith("  imagenet  (") for line in lines)
    for name in (p.stem for p in (ROOT / "pipeline/evals").glob("[!_]*.py")):
        (place,) = [
            n for n, line in enumerate(lines) if line.startswith(f"  {name}: ") and n > lines.index("evaluations:")
        ]
        fields = registry.module("pipeline.evals", name).Config.model_fields
        assert all(re.search(rf"\b{field}\b", lines[place + 1]) for field in fields), name


def test_the_list_speaks_as_a_suite_is_written(own):
    told = 'name = "x"\na = true\nb = ["c"]\nd = { e = 1 }\n'
    (own / "told.toml").write_text(f"# How near are they, and\n# why? And more.\n\n# Not this.\n[[evals]]\n{told}")
    text = listing([own])
    assert '    How near are they, and why?\n    x (a = true, b = ["c"], d = { e = 1 })\n' in text
    lines = text.splitlines()[text.splitlines().index("evaluations:") :]
    told = {line.split(":")[0].strip(): after.strip() for line, after in pairwise(lines) if ": " in line}
    assert told["knn"] == 'train = "train", test = "val", k = [10, 20, 100, 200], temperature = 0.07'
    assert "unknown (required)" in told["ood"] and "l2 = 1024.0" in told["few_shot"]
    assert 'length = "20ep"' in told["attentive_probe"] and "heads," in told["attentive_probe"]
    for name in (p.stem for p in (ROOT / "pipeline/evals").glob("[!_]*.py")):
        assert not re.search(r"None|True|False|Field\(|\.\.\.|'", told[name]), told[name]


def test_listing_needs_no_framework():
    code = (
        "import sys\nfrom launch.suites import listing\nlisting([])\n"
        "print([m for m in ('torch', 'numpy', 'timm', 'deepspeed') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_suite_by_its_name(own, monkeypatch):
    assert find_suite("mine", [own]) == own / "mine.toml"
    assert find_suite("glyphs", []).name == "glyphs.toml" and find_suite("x/y.toml", []) == Path("x/y.toml")
    (own / "glyphs.toml").write_text(SUITE)
    assert find_suite("glyphs", [own]) == own / "glyphs.toml"
    with pytest.raises(ConfigError, match=r"no suite 'glyfs'.*did you mean 'glyphs'"):
        find_suite("glyfs", [])
    with pytest.raises(ConfigError, match=r"--include .*nowhere: there is no such folder"):
        listing([own / "nowhere"])


def test_words_become_the_command_of_the_ranks(own):
    wish = Wish(["a", "b@all", "mine"], ["batch=3"], [own], ["ema", "0.1"], True, Path("out"), True, 5)
    assert arguments_of(wish) == [
        "eval", "--run", "random:a", "--run", "random:b@all", "--suite", str(own / "mine.toml"), "--set", "batch=3",
        "--weights", "ema", "--weights", "0.1", "--out", "out", "--limit", "5", "--again",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="say what is evaluated"):
        arguments_of(Wish(["mine"], include=[own]))
    with pytest.raises(ConfigError, match="--weights best: write model, ema"):
        arguments_of(Wish(["a", "mine"], include=[own], weights=["best"]))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("[7]", "[0]"), r"evals\[0\]\.k"),
        (('on = ["one"]', 'on = ["two"]'), r"no \[data.two\] \(there are: one\)"),
        (('on = ["one"]', 'on = ["one", "one"]'), "names a data set twice"),
        (('val = "b"', 'test = "b"'), r"knn looks at the stream 'val', and \[data.one\] has none"),
        (("", ""), "data.one.train: no manifest"),
        ((SUITE.partition("[[evals]]")[0], ""), "there is no data"),
        (("# Mine.", 'judge = "nowhere"'), "judge: nowhere: there is no nowhere; name a run"),
        (('name = "knn"\non = ["one"]\nk = [7]', 'name = "frechet"'), r"evals\[0\]: frechet needs a model that judges"),
    ],
)
def test_a_suite_is_sound_or_each_mistake_is_said(change, says, own):
    (own / "mine.toml").write_text(SUITE.replace(*change))
    with pytest.raises(ConfigError, match=says):
        validate("mine", [own], [])
