"""How subjects are spelled: what each spelling finds, what it says when it finds nothing, and what they are called."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.core.errors import ConfigError
from pipeline.suites.subjects import Spec, find


def make_run(folder: Path, *steps: int, averages: tuple[str, ...] = ()) -> Path:
    """A run as far as names and manifests go."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").touch()
    for step in steps:
        make_checkpoint(folder / "checkpoints" / f"step-{step:08d}", step, averages)
    return folder


def make_checkpoint(folder: Path, step: int, averages: tuple[str, ...] = ()) -> Path:
    folder.mkdir(parents=True)
    tensors = {f"{kind}/w": [[1], "float32"] for kind in ("model", "optimizer", *averages)}
    (folder / "checkpoint.json").write_text(json.dumps({"tensors": tensors, "state": {"step": step}}))
    return folder


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs; one of them has averages."""
    monkeypatch.chdir(tmp_path)
    make_run(Path("runs/mae"), 3, 6, 12)
    make_run(Path("runs/simclr"), 6, averages=("ema", "ema-0.05", "ema-0.1"))
    return tmp_path


def names(*specs: str, weights=("model",)) -> list[str]:
    return [spec.name for spec in find(specs, weights)]


@pytest.mark.parametrize(
    ("specs", "found"),
    [
        (["runs/mae"], ["mae: step 12"]),
        (["runs/mae/"], ["mae: step 12"]),
        (["runs/mae/checkpoints/step-00000003"], ["mae: step 3"]),
        (["runs/mae@6"], ["mae: step 6"]),
        (["runs/mae@all"], ["mae: step 3", "mae: step 6", "mae: step 12"]),
        (["runs/*"], ["mae: step 12", "simclr: step 6"]),
        (["runs/*@6"], ["mae: step 6", "simclr: step 6"]),
        (["runs/mae/checkpoints/*"], ["mae: step 3", "mae: step 6", "mae: step 12"]),
        (["runs/simclr", "runs/mae@3", "runs/mae@3"], ["simclr: step 6", "mae: step 3"]),
        (["runs/mae", "runs/mae@12", "random:runs/mae"], ["mae: step 12", "mae: random init"]),
        (["random:vit_tiny_patch16_224"], ["random:vit_tiny_patch16_224"]),
        (["random:runs/*"], ["mae: random init", "simclr: random init"]),
    ],
)
def test_what_is_found(specs, found, runs):
    assert names(*specs) == found


def test_every_average_of_every_checkpoint(runs):
    found = find(["runs/simclr", "random:runs/simclr"], ["model", "ema", 0.07])
    assert [s.name for s in found] == [
        "simclr: step 6",
        "simclr: step 6, ema",
        "simclr: step 6, 0.07",
        "simclr: random init",
    ]
    assert [s.weights for s in found] == ["model", "ema", 0.07, "model"]
    assert {s.run for s in found} == {Path("runs/simclr"), runs / "runs" / "simclr"}


def test_the_newest_one_may_be_another_when_it_is_opened_and_a_named_one_may_not(runs):
    assert find(["runs/mae"])[0].newest and not find(["runs/mae@12"])[0].newest
    (both,) = find(["runs/mae", "runs/mae@12"])
    assert not both.newest and both.called(step=15) == "step 15"


def test_a_name_with_an_at_is_a_name_where_it_is_there(runs):
    make_run(Path("runs/lr@3"), 5)
    assert names("runs/lr@3", "runs/lr@3@5") == ["lr@3: step 5"]


def test_checkpoints_are_known_by_what_is_in_them(runs):
    taken_out = make_checkpoint(Path("best"), 40)
    assert names("best") == ["best: step 40"] and find(["best"])[0].run == taken_out
    (Path("runs/mae/checkpoints") / "latest").write_text("step-00000012")
    (Path("runs/mae/checkpoints") / "step-00000015").mkdir()  # being removed
    assert names("runs/mae") == ["mae: step 12"]


def test_runs_of_the_same_name_are_told_apart(runs):
    for place in ("a/seed0", "b/seed0", "b/seed1"):
        make_run(Path(place), 6)
    assert names("a/seed0", "b/*") == ["a/seed0: step 6", "b/seed0: step 6", "seed1: step 6"]


def test_exports_and_weights_of_others(runs):
    tensors = {"w": torch.zeros(1)}
    for folder in ("out", "clip", "plain"):
        Path(folder).mkdir()
    save_file(tensors, "out/objective.safetensors", {"config": "{}"})
    save_file(tensors, "out/encoder.safetensors", {"timm": "{}"})
    save_file(tensors, "plain/model.safetensors")
    save_file(tensors, "plain/other.safetensors")
    Path("clip/open_clip_config.json").write_text("{}")
    found = find(
        ["out", "out/encoder.safetensors", "timm:resnet18=plain/model.safetensors", "timm:resnet18=plain/*",
         "open_clip:ViT-B-32=plain/model.safetensors", "clip"],
        ["ema"],
    )  # fmt: skip
    assert [(s.kind, s.name) for s in found] == [
        ("objective", "objective.safetensors"),
        ("encoder", "encoder.safetensors"),
        ("timm", "timm:resnet18=model.safetensors"),
        ("timm", "timm:resnet18=other.safetensors"),
        ("open_clip", "open_clip:ViT-B-32=model.safetensors"),
        ("open_clip", "clip"),
    ]
    assert find(["open_clip:clip"])[0] == Spec("open_clip:clip", "open_clip", Path("clip"), source="clip")


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("runs/nowhere", "there is no runs/nowhere"),
        ("runs", "holds runs/begun and 2 more; write runs/\\* for all"),
        ("runs/mae/checkpoints", "write runs/mae@all"),
        ("runs/mae@7", "no checkpoint of step 7, only of 3, 6, 12"),
        ("runs/mae@best", "a step, or 'all', not 'best'"),
        ("runs/begun", "holds no checkpoint yet.*random:runs/begun"),
        ("runs/b*", "of 1 that match none can be evaluated; runs/begun: .*no checkpoint"),
        ("runs/q*", "nothing matches runs/q"),
        ("empty", "neither a run .* nor a checkpoint .* nor an export"),
        ("empty@3", "only of a run"),
        ("plain.safetensors", "timm:NAME=plain.safetensors"),
        ("damaged.safetensors", "damaged or no safetensors"),
        ("weights.pth", "open_clip:NAME=weights.pth"),
        ("timm:vit", "timm:NAME=FILE"),
        ("timm:=plain.safetensors", "timm:NAME=FILE"),
        ("timm:resnet18=empty", "is a folder"),
        ("open_clip:ViT-B-32=nowhere.bin", "nowhere.bin is not there"),
        ("open_clip:empty", "open_clip:NAME=FILE"),
        ("random:", "random:RUN"),
        ("random:runs/nowhere", "is no run"),
        ("random:empty", "is no run"),
    ],
)
def test_what_is_not_there_is_named_with_what_is(spec, says, runs):
    make_run(Path("runs/begun"))
    Path("empty").mkdir()
    save_file({"w": torch.zeros(1)}, "plain.safetensors")
    Path("damaged.safetensors").write_bytes(b"\xff" * 30)
    Path("weights.pth").write_bytes(b"x")
    with pytest.raises(ConfigError, match=says) as raised:
        find([spec])
    assert str(raised.value).startswith(f"{spec}: ")


def test_nothing_at_all_is_said_so():
    with pytest.raises(ConfigError, match="nothing to evaluate"):
        find([])


@pytest.mark.parametrize(("run", "weights", "there"), [("mae", "ema", "only those as trained"), ("mae", 0.1, "power")])
def test_averages_that_were_not_kept(run, weights, there, runs):
    with pytest.raises(ConfigError, match=there):
        find([f"runs/{run}"], [weights])


def test_a_pattern_says_what_it_passes_over(runs):
    make_run(Path("runs/begun"))
    Path("runs/notes.txt").touch()
    said: list[str] = []
    assert [s.source for s in find(["runs/*"], say=said.append)] == ["mae", "simclr"]
    assert "runs/begun holds no checkpoint yet" in said[0] and "runs/notes.txt" in said[1] and len(said) == 2


def test_finding_needs_no_torch(runs):
    code = "import sys; from pipeline.suites.subjects import find; find(['runs/*']); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "timm"} & set(loaded)


def test_what_is_gone_by_now_may_be_passed_over(runs):
    said: list[str] = []
    found = find(["runs/mae@3", "runs/mae@4", "runs/mae@6"], say=said.append, fleeting=True)
    assert [spec.step for spec in found] == [3, 6]
    assert said == ["passed over runs/mae@4: runs/mae has no checkpoint of step 4, only of 3, 6, 12"]
    assert find(["runs/mae@4"], say=said.append, fleeting=True) == []
