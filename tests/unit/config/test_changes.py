"""What may change between two starts of a run, and what may not."""

from __future__ import annotations

import tomllib
from tomllib import loads as tomllib_loads

import pytest

from pipeline.config.changes import ABSENT, RULES, Change, changes, flat, flat_toml, refuse, rule_of
from pipeline.config.schema import Phase, RunConfig
from pipeline.core.errors import ConfigError

RUN = {
    "run": {"folder": "runs/x", "length": "2ep", "global_batch": 8},
    "data": {"train": "shards"},
    "objective": {"name": "mae", "mask_ratio": 0.75},
    "optimizer": {"lr": 1e-3},
    "engine": {"name": "accelerate", "micro_batch": 4},
}


def with_value(key: str, value: object) -> dict:
    changed = {table: dict(values) for table, values in RUN.items()}
    table, name = key.split(".", 1)
    changed.setdefault(table, {})[name] = value
    return changed


@pytest.mark.parametrize(
    ("key", "rule"),
    [
        ("run.folder", "how"),
        ("run.length", "course"),
        ("run.seed", "never"),
        ("run.global_batch", "never"),
        ("data.train", "how"),
        ("data.window", "never"),
        ("data.image.scale", "experiment"),
        ("data.fields", "experiment"),
        ("data.captions.length", "experiment"),
        ("data.captions.tokenizer", "how"),
        ("data.beside.target.path", "how"),
        ("data.beside.target.image.size", "experiment"),
        ("objective.name", "never"),
        ("objective.mask_ratio", "experiment"),
        ("objective.encoder_args.depth", "experiment"),
        ("objective.weights", "how"),
        ("objective.sampler.steps", "how"),
        ("objective.feature_noise", "how"),
        ("optimizer.name", "never"),
        ("optimizer.lr", "course"),
        ("schedule.warmup", "course"),
        ("engine.name", "how"),
        ("engine.precision", "course"),
        ("ema.decay", "course"),
        ("every.log", "how"),
        ("something.new", "experiment"),
        ("phases.critic.optimizer.lr", "course"),
        ("phases.critic.optimizer.name", "never"),
    ],
)
def test_the_rule_for_each_setting(key, rule):
    assert rule_of(key) == rule


def test_the_table_names_settings_that_there_are():
    """A name that is mistyped, or gone, would hold for nothing."""
    top = RunConfig.model_fields
    for pattern, _ in RULES:
        table, _, rest = pattern.partition(".")
        assert table in top, pattern
        model = top[table].annotation
        if table == "phases":  # of any name
            model, rest = Phase, rest.removeprefix("*.")
        if table not in ("objective", "ema") and rest:
            assert rest.split(".")[0] in model.model_fields, pattern  # type: ignore[union-attr]


def test_every_difference_is_found_and_only_those():
    assert changes(RUN, RUN) == []
    found = changes(RUN, with_value("objective.mask_ratio", 0.1) | {"ema": {"decay": 0.9}})
    assert found == [
        Change("ema.decay", ABSENT, 0.9, "course"),
        Change("objective.mask_ratio", 0.75, 0.1, "experiment"),
    ]
    assert [str(c) for c in changes(RUN, with_value("optimizer.lr", 0.1))] == ["optimizer.lr: 0.001, now 0.1"]


def test_a_setting_that_is_gone_is_a_difference():
    old = with_value("data.cache", "x")
    assert [(c.key, c.now) for c in changes(old, RUN)] == [("data.cache", ABSENT)]


def test_another_experiment_is_refused_unless_named():
    found = changes(RUN, with_value("objective.mask_ratio", 0.1))
    with pytest.raises(ConfigError) as error:
        refuse(found, (), "exp.toml", "step 12 of runs/x")
    for word in ("exp.toml", "step 12 of runs/x", "objective.mask_ratio: 0.75, now 0.1", 'run.change = ["objective.ma'):
        assert word in str(error.value)
    refuse(found, ("objective.mask_ratio",), "exp.toml", "step 12")
    refuse(found, ("objective",), "exp.toml", "step 12")
    with pytest.raises(ConfigError, match="mask_ratio"):
        refuse(found, ("objective.mask",), "exp.toml", "step 12")


def test_what_cannot_be_taken_over_is_refused_though_named():
    found = changes(RUN, with_value("optimizer.name", "sgd"))
    with pytest.raises(ConfigError, match=r"optimizer.name: 'absent', now 'sgd'") as error:
        refuse(found, ("optimizer.name",), "exp.toml", "step 12")
    assert "run.change" not in str(error.value)


def test_how_and_course_are_free():
    found = changes(RUN, with_value("run.length", "9ep") | {"every": {"log": "1ba"}})
    assert len(found) == 2
    refuse(found, (), "exp.toml", "step 12")


PLAIN = """[run]
seed = 1
list = [
    "a",
    "b",
]

[data.image]
size = 32

[data.image.more]
x = 1.5

[every]
"""


@pytest.mark.parametrize(
    "text",
    [
        PLAIN,
        "top = true\n" + PLAIN,
        "",
        'x = """\n[run]\ny = 1\n"""\n',  # a header in a text
        "x = [\n[1, 2],\n[3]\n]\n[a]\nb = [\n  [\n1]\n]\n",  # and in an array
        '[["a"]]\nx = 1\n[[a]]\nx = 2\n[a.b]\ny = 1\n',
        '["a.b"]\nx = 1\n[a.b]\nx = 2\n',
        "[ a . b ]\nx = 1\n[a.c] # why\nx = 2\n",
        "[a]\nb.c = 1\n[d]\nb = {c = 1, d = {e = 2}}\n",
        "[a.b.c]\nx = 1\n[a]\ny = 2\n[a.b]\nz = 3\n",
        "[a]\r\nx = 1\r\n[b]\r\ny = 2\r\n",
    ],
)
def test_tables_read_one_by_one_are_those_of_the_whole_text(text):
    for _ in range(2):  # the second time from memory
        found = flat_toml(text)
        assert found == flat(tomllib.loads(text))
        found["run.seed"] = 5  # what is given away is not what is kept


@pytest.mark.parametrize(
    "text",
    [
        "[a]\nx = 1\n[a]\ny = 2\n",
        '[a]\nx = 1\n["a"]\ny = 2\n',
        "[a]\nx = 1\n[ a ]\ny = 2\n",
        "[a]\nb = 1\n[a.b]\nx = 1\n",
        "[a]\nb.c = 1\n[a.b]\nd = 1\n",
        "[a]\nb = {}\n[a.b.c]\nd = 1\n",
        "a = 1\n[a]\nx = 1\n",
        "[a]\nx = [\n[b]\ny = 2\n",
        "[a]\nx = \n",
    ],
)
def test_tables_that_contradict_each_other_are_told(text):
    with pytest.raises(tomllib.TOMLDecodeError):
        tomllib.loads(text)
    with pytest.raises(tomllib.TOMLDecodeError):
        flat_toml(text)


def test_a_table_that_many_texts_have_is_parsed_once(monkeypatch):
    parsed = []
    monkeypatch.setattr(
        "pipeline.config.changes.tomllib.loads", lambda text: parsed.append(text) or tomllib_loads(text)
    )
    for seed in range(5):
        assert flat_toml(f"[run]\nseed = {seed}\n[once_only]\nx = 1\n") == {"run.seed": seed, "once_only.x": 1}
    assert sum("once_only" in text for text in parsed) == 1
