"""Subjects of our own: checkpoints of any engine and world size, all of their averages, exports; the same features."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipeline.core.errors import CheckpointError
from pipeline.dist.group import process_group
from pipeline.run.__main__ import main
from pipeline.suites.subject import Subject, open_subject
from pipeline.suites.subjects import Spec, find
from tests.integration.runs import codes, overrides, run


@pytest.fixture(scope="module")
def trained(glyphs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By two ranks under ZeRO 3, with averages."""
    folder = tmp_path_factory.mktemp("runs") / "mae"
    own = ["engine.name=deepspeed", "engine.zero=3", "run.length=6ba", "ema.decay=0.5", "ema.power=[0.05,0.1]"]
    assert codes(run(2, "mae", overrides(folder, glyphs / "train", *own))) == [0, 0]
    return folder


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "mae")
    return tmp_path / "mae"


def opened_as(spec: Spec) -> Subject:
    with process_group(1) as place:
        return open_subject(spec, place)


def opened(*spelled: str, weights=("model",)) -> list[Subject]:
    return [opened_as(spec) for spec in find([*spelled], weights)]


def features(subject: Subject) -> torch.Tensor:
    size = subject.crop(None).shape
    image = torch.randint(0, 256, (4, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return subject.encoders["image"](image)


@pytest.mark.parametrize("weights", ["model", "ema", 0.07])
def test_a_checkpoint_and_both_of_its_exports_are_the_same(weights, trained, tmp_path):
    command = ["export", "--run", str(trained), "--out", str(tmp_path / "out"), "--weights", str(weights)]
    assert main(command) == 0
    (checkpoint,) = opened(str(trained), weights=[weights])
    whole, encoder = opened(str(tmp_path / "out"), str(tmp_path / "out" / "encoder.safetensors"))
    expected = features(checkpoint)
    assert not any(p.requires_grad for m in checkpoint.encoders.values() for p in m.parameters())
    torch.testing.assert_close(features(whole), expected, rtol=0, atol=0)
    torch.testing.assert_close(features(encoder), expected, rtol=1e-5, atol=1e-6)
    assert whole.image == checkpoint.image and encoder.crop(None).shape == checkpoint.crop(None).shape
    assert whole.classes == checkpoint.classes != ()
    averaged = "" if weights == "model" else f", {weights}"
    assert checkpoint.title == f"mae: step 6{averaged}" and whole.title == "objective.safetensors"


def test_all_steps_averages_and_the_untrained_model_differ(trained):
    found = opened(f"{trained}@all", f"random:{trained}", weights=["model", "ema", 0.05])
    assert [s.title for s in found[-4:]] == ["mae: step 6", "mae: step 6, ema", "mae: step 6, 0.05", "mae: random init"]
    rows = [features(s) for s in found]
    assert len(found) == 7
    for i, row in enumerate(rows):
        assert not any(torch.equal(row, other) for other in rows[:i]), found[i].title


@pytest.mark.parametrize("ends", ["removed", "damaged"])
def test_a_run_that_goes_on_removes_what_was_its_newest_checkpoint(ends, copied, capsys):
    """Between listing and opening. What was asked for by its step is an error, with the reason."""
    newest, named = find([str(copied)])[0], find([f"{copied}@6"])[0]
    folder = copied / "checkpoints" / "step-00000006"
    if ends == "removed":
        shutil.rmtree(folder)
    else:
        next(folder.glob("*.safetensors")).write_bytes(b"")
    assert opened_as(newest).title == "mae: step 3"
    says = r"is gone: .*run\.keep" if ends == "removed" else f"^{folder}: .* has 0 bytes of"
    with pytest.raises(CheckpointError, match=says):
        opened_as(named)


def test_a_newer_one_is_taken_for_the_one_that_has_gone(copied):
    (spec,) = find([str(copied)])
    shutil.move(copied / "checkpoints" / "step-00000006", copied / "checkpoints" / "step-00000009")
    assert opened_as(spec).step == 6  # what it says of itself, whatever its folder is called


def changed(file: Path, drop: str = "", metadata: tuple[str, ...] = ()) -> None:
    """Write a safetensors file anew without a tensor or some of its metadata."""
    with safe_open(file, "pt") as f:
        facts = {k: v for k, v in f.metadata().items() if k not in metadata}
    save_file({k: v for k, v in load_file(file).items() if k != drop}, file, facts)


def test_exports_that_are_not_whole_or_too_old_say_so(trained, tmp_path):
    assert main(["export", "--run", str(trained), "--out", str(tmp_path / "out")]) == 0
    whole, encoder = (tmp_path / "out" / f"{name}.safetensors" for name in ("objective", "encoder"))
    (spec,) = find([str(encoder)])
    changed(encoder, metadata=("normalisation",))
    with pytest.raises(CheckpointError, match=r"does not say how images are normalised; export it again"):
        opened_as(spec)
    (spec,) = find([str(whole)])
    first = sorted(load_file(whole))[0]
    changed(whole, drop=first)
    with pytest.raises(CheckpointError, match=rf"of the objective 'mae': 1 missing \({first}\), 0 not expected"):
        opened_as(spec)
    changed(whole, metadata=("facts",))
    with pytest.raises(CheckpointError, match="exported by an earlier version"):
        opened_as(spec)


def test_what_an_export_says_of_itself(trained, tmp_path):
    assert main(["export", "--run", str(trained), "--out", str(tmp_path)]) == 0
    with safe_open(tmp_path / "encoder.safetensors", "pt") as file:
        assert json.loads(file.metadata()["normalisation"])["mean"] == [0.485, 0.456, 0.406]
