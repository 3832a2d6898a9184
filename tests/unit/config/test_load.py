import pytest

from pipeline.config.durations import Duration
from pipeline.config.load import dropped, dump, load, load_run, load_suite, merge, parse_overrides, parse_value
from pipeline.config.mistakes import Mistakes
from pipeline.config.schema import RunConfig, SuiteConfig
from pipeline.core.errors import ConfigError

RUN = """
[run]
folder = "runs/x"
length = "90ep"
global_batch = 64
[data]
train = "shards"
[objective]
name = "mae"
mask_ratio = 0.75
decoder = {depth = 2, widths = [1, 2]}
[optimizer]
lr = 1e-3
[engine]
name = "deepspeed"
micro_batch = 8
zero = 2
"""
SUITE = """
streams = {train = "shards/train", val = "shards/val"}
[[evals]]
name = "knn"
k = 20
[[evals]]
name = "linear_probe"
"""


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


def test_values_arrive_with_their_types(write):
    config = load_run(write("run.toml", RUN))
    assert config.run.length == Duration(90, "ep")
    assert config.optimizer.lr == 1e-3
    assert config.engine.zero == 2
    assert config.objective.settings == {"mask_ratio": 0.75, "decoder": {"depth": 2, "widths": [1, 2]}}
    assert config.data.image.shape == (224, 224)


def test_base_is_below_and_relative_to_its_file(write):
    write("base/deep.toml", "[run]\nseed = 1\nkeep = 1\nfolder = 'deep'")
    write("base/vit.toml", "base = ['deep.toml']\n[run]\nseed = 2\n[data]\nimage = {size = 96, views = 2}")
    write("base/other.toml", "[run]\nfolder = 'other'\nkeep = 5")
    bases = "base = ['../base/vit.toml', '../base/other.toml']\n"
    config = load_run(write("a/run.toml", bases + RUN + "[data.image]\nsize = 32"))
    assert (config.run.folder, config.run.seed, config.run.keep) == ("runs/x", 2, 5)
    assert (config.data.image.size, config.data.image.views) == (32, 2)


def test_overrides_are_above(write):
    path = write("run.toml", RUN)
    config = load_run(
        path, ["run.seed=3", "run.folder=runs/y z", "data.image.size=[8, 16]", "objective.mask_ratio=0.5"]
    )
    assert (config.run.seed, config.run.folder, config.data.image.shape) == (3, "runs/y z", (8, 16))
    assert config.objective.settings["mask_ratio"] == 0.5


def test_of_another_objective_nothing_stays(write):
    config = load_run(write("run.toml", RUN), ["objective.name=supervised"])
    assert config.objective.settings == {}


def test_what_another_engine_or_optimizer_has_too_stays_and_the_rest_is_told(write):
    path = write(
        "run.toml",
        RUN.replace("lr = 1e-3", "lr = 0.1\nclip = 2.0\nweight_decay = 0.3\nbetas = [0.5, 0.6]")
        + 'precision = "fp32"\n[schedule]\nwarmup = "3%"\nfinal = 0.5\n',
    )
    overrides = ["engine.name=accelerate", "optimizer.name=sgd", "schedule.name=constant", "objective.name=simclr"]
    config = load_run(path, overrides)
    assert (config.engine.name, config.engine.precision, config.engine.micro_batch) == ("accelerate", "fp32", 8)
    assert (config.optimizer.lr, config.optimizer.clip, config.optimizer.weight_decay) == (0.1, 2.0, 0.3)
    assert config.schedule.settings == {"warmup": "3%", "cooldown": "0%"}
    assert sorted(dropped(path, overrides)) == [
        "engine.name is 'accelerate', so these of 'deepspeed' are dropped: zero",
        "objective.name is 'simclr', so these of 'mae' are dropped: decoder, mask_ratio",
        "optimizer.name is 'sgd', so these of 'adamw' are dropped: betas",
        "schedule.name is 'constant', so these of 'cosine' are dropped: final",
    ]
    assert dropped(path, ["optimizer.name=adamw", "engine.name=deepspeed"]) == []


def test_a_key_is_unset_from_the_command_line_and_by_a_file(write):
    write("base.toml", RUN.replace("lr = 1e-3", "lr = 1e-3\nclip = 1.0\nweight_decay = 0.3"))
    plain = write("plain.toml", 'base = ["base.toml"]\n')
    assert load_run(plain).optimizer.clip == 1.0
    config = load_run(plain, ["optimizer.clip=", "optimizer.weight_decay = "])
    assert (config.optimizer.clip, config.optimizer.weight_decay) == (None, 0.05)
    assert load_run(plain, ["optimizer.clip=", "optimizer.clip=3.0"]).optimizer.clip == 3.0
    assert load_run(plain, ["schedule.final=0.1", "optimizer.groups=[]"]).schedule.settings["final"] == 0.1
    unset = 'base = ["base.toml"]\nunset = ["optimizer.clip", "optimizer.weight_decay"]\n'
    child = write("child.toml", unset + "[optimizer]\nweight_decay = 0.7\n")
    assert (load_run(child).optimizer.clip, load_run(child).optimizer.weight_decay) == (None, 0.7)
    with pytest.raises(
        ConfigError, match=r"optimizer\.klip: is set nowhere, so there is nothing to unset \(in --set\)"
    ):
        load_run(plain, ["optimizer.klip="])
    with pytest.raises(ConfigError, match="unset must be a list of keys"):
        load_run(write("odd.toml", 'base = ["base.toml"]\nunset = "optimizer.clip"\n'))
    with pytest.raises(ConfigError, match=r"optimizer\.lr: missing"):
        load_run(plain, ["optimizer.lr="])


def test_mistakes_of_the_schedule_stand_beside_those_of_the_rest(write):
    with pytest.raises(ConfigError) as caught:
        load_run(
            write("run.toml", RUN), ["run.length=5%", "schedule.name=power", "schedule.a=-1", "schedule.final=0.5"]
        )
    said = str(caught.value)
    assert "run: length cannot be" in said and "schedule.a: expected a number >= 0" in said
    assert "schedule.final: unknown key (there are: warmup, cooldown, a, b) (in --set)" in said
    with pytest.raises(ConfigError, match=r"schedule\.name: unknown schedule 'cosin'; did you mean 'cosine'"):
        load_run(write("run.toml", RUN), ["schedule.name=cosin"])


def test_files_of_runs_from_before_schedules_had_settings_of_their_own(write):
    old = '[schedule]\nname = "cosine"\nwarmup = "5%"\nfinal = 0.0\ncooldown = "0%"\n'
    assert load_run(write("a.toml", RUN + old)).schedule.settings == {"warmup": "5%", "final": 0.0}
    old = '[schedule]\nname = "constant"\nwarmup = "5%"\nfinal = 0.0\ncooldown = "1%"\n'
    assert load_run(write("b.toml", RUN + old)).schedule.settings == {"warmup": "5%", "cooldown": "1%"}


def test_merge_leaves_its_arguments_alone():
    below, above = {"a": {"b": 1, "c": [1]}, "d": 1}, {"a": {"b": 2}, "d": {"e": 1}}
    assert merge(below, above) == {"a": {"b": 2, "c": [1]}, "d": {"e": 1}}
    assert below == {"a": {"b": 1, "c": [1]}, "d": 1}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e-3", 1e-3),
        ("true", True),
        ("[1, 2]", [1, 2]),
        ('"3"', "3"),
        ("90ep", "90ep"),
        ("two words", "two words"),
        ("2026-01-31", "2026-01-31"),
        ("12:30:00", "12:30:00"),
        ("", ""),
        ("a=b", "a=b"),
        ("1\nb = 2", "1\nb = 2"),
        ("{a = 1}", {"a": 1}),
    ],
)
def test_value_of_an_override(text, value):
    assert parse_value(text) == value


def test_overrides_that_cannot_be_read_are_all_named():
    with pytest.raises(Mistakes) as caught:
        parse_overrides(["a.b=1", "lr", "a..b=1", "x=[1, 2", "=3"])
    assert len(caught.value.problems) == 4


def test_override_through_a_value(write):
    with pytest.raises(ConfigError, match=r"run\.seed: expected a whole number, found a table \(in --set\)"):
        load_run(write("run.toml", RUN), ["run.seed=1", "run.seed.x=1"])


def test_circle_of_bases(write):
    write("a.toml", "base = ['b.toml']")
    with pytest.raises(ConfigError, match=r"circle: .*a\.toml -> .*b\.toml -> .*a\.toml"):
        load_run(write("b.toml", "base = ['a.toml']").with_name("a.toml"))


def test_files_that_cannot_be_read(write, tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*gone\.toml, which .*run\.toml names as its base"):
        load_run(write("run.toml", "base = ['gone.toml']"))
    with pytest.raises(ConfigError, match=r"cannot read .*: Is a directory"):
        load_run(tmp_path)
    with pytest.raises(ConfigError, match=r"is not TOML: .*line 2"):
        load_run(write("run.toml", "a = 1\nb = nope"))
    (tmp_path / "binary.toml").write_bytes(b"a = '\xff'")
    with pytest.raises(ConfigError, match="is not TOML"):
        load_run(tmp_path / "binary.toml")
    with pytest.raises(ConfigError, match="base must be a list of files"):
        load_run(write("run.toml", "base = 'x.toml'"))


def test_a_mistake_names_the_file_that_it_is_in(write):
    base = write("base.toml", "[optimizer]\neps = -1\n[run]\nseed = -2")
    with pytest.raises(Mistakes) as caught:
        load_run(write("run.toml", "base = ['base.toml']" + RUN + "[schedule]\nfinal = 2"), ["run.seed=-1"])
    assert caught.value.problems == (
        "run.seed: expected a number >= 0, found -1 (in --set)",
        f"optimizer.eps: expected a number > 0.0, found -1 (in {base})",
        "schedule.final: expected a number <= 1.0, found 2",
    )


def test_kind_of_file(write):
    assert isinstance(load(write("suite.toml", SUITE)), SuiteConfig)
    assert isinstance(load(write("run.toml", RUN)), RunConfig)


@pytest.mark.parametrize("engine", ["deepspeed", "accelerate"])
def test_dump_loads_back(write, engine):
    overrides = ["optimizer.clip=1.0", "data.image.size=[8, 16]", "schedule.warmup=1.1Gsa", "run.folder=a 'b' \"c\""]
    if engine == "accelerate":
        overrides += ["engine.name=accelerate", "engine.micro_batch=2"]
    config = load_run(write("run.toml", RUN), overrides)
    again = load_run(write("again.toml", dump(config)))
    assert again == config
    assert dump(again) == dump(config)


def test_dump_of_a_suite_loads_back(write):
    suite = load_suite(write("suite.toml", SUITE))
    assert [e.name for e in suite.evals] == ["knn", "linear_probe"]
    assert load_suite(write("again.toml", dump(suite))) == suite


def test_a_suites_stream_may_be_of_some_classes(write):
    """A stream may be a path alone, and a table of one holds whatever a run's data does: lists too."""
    some = '{path = "shards/val", by_label = {classes = ["cat", "dog"]}}'
    others = '{path = "shards/val", by_label = {without = ["cat"], per_class = 2}}'
    text = SUITE.replace('val = "shards/val"', f'val = "shards/val", some = {some}, others = {others}')
    suite = load_suite(write("suite.toml", text))
    parts = [suite.streams[name].by_label for name in ("some", "others")]
    assert parts[0] is not None and parts[0].classes == ("cat", "dog")
    assert parts[1] is not None and parts[1].without == ("cat",) and parts[1].per_class == 2
    assert load_suite(write("again.toml", dump(suite))) == suite
    with pytest.raises(Mistakes, match="classes: expected a list"):
        load_suite(write("wrong.toml", text.replace('["cat", "dog"]', '"cat"')))


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    (tmp_path / "run.toml").write_bytes(b"\xef\xbb\xbf" + RUN.encode())
    assert load_run(tmp_path / "run.toml") == load_run(written(tmp_path / "plain.toml"))


@pytest.mark.parametrize("key", ["run.folder", "data.cache.folder"])
def test_a_home_that_nobody_replaces_is_refused(key, tmp_path):
    path = written(tmp_path / "run.toml")
    with pytest.raises(ConfigError, match=rf"{key}: .*~ is not replaced.*write the path out"):
        load_run(path, [f"{key}=~/runs/x", "data.cache.limit_gb=1"])


def written(path):
    path.write_text(RUN)
    return path
