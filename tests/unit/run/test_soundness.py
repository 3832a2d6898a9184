"""What `sluice check` finds of runs that cannot start, all at once; and samples of mixed data sets."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from data_prep.tokenizer import train_tokenizer
from pipeline.config.load import load_run
from pipeline.config.schema import RunConfig
from pipeline.core import manifest as manifests
from pipeline.run.build import sample_batch
from pipeline.run.soundness import problems
from tests.integration.runs import SMOKE, overrides
from tests.unit.data.shards import write_data


def run_of(objective: str, data: str, *more: str) -> RunConfig:
    return load_run(SMOKE / f"{objective}.toml", overrides(Path("nowhere"), Path(data), *more))


@pytest.fixture(scope="module")
def words(glyphs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 300 words or fewer."""
    import shutil

    folder = tmp_path_factory.mktemp("words") / "data"
    shutil.copytree(glyphs / "train", folder)
    train_tokenizer(str(folder), 300)
    return folder


def bare(folder: Path, tmp_path: Path, fields: tuple[str, ...], classes: tuple[str, ...] | None = None) -> str:
    """The manifest of a data set with some of its fields and other classes, far from the shards."""
    whole = manifests.load(folder)
    kept = {name: whole.fields[name] for name in fields}
    names = whole.classes if classes is None else classes
    manifests.save(manifests.Manifest(str(tmp_path), whole.shards, kept, names), tmp_path)
    return str(tmp_path)


def test_sound_runs_have_none(glyphs, words):
    for objective in ("mae", "simclr", "moco", "supervised", "ddpm"):
        assert problems(run_of(objective, f"{glyphs}/train"), "x") == []
    assert problems(run_of("clip", str(words)), "x") == []


def test_a_model_that_timm_does_not_know_and_a_missing_tokenizer_at_once(glyphs):
    found = problems(run_of("clip", f"{glyphs}/train", "objective.encoder=vit_tinny_patch16_224"), "x")
    assert len(found) == 2
    assert "has no tokenizer; train one with" in found[0]
    assert "timm has no model 'vit_tinny_patch16_224'; did you mean 'vit_tiny_patch16_224'?" in found[1]


def test_data_without_captions_labels_or_classes(glyphs, tmp_path):
    captionless = bare(glyphs / "train", tmp_path / "a", ("image", "label")) if (tmp_path / "a").mkdir() is None else ""
    (found, *more) = problems(run_of("clip", captionless), "x")
    assert "data.captions.fields: " in found and "has no field 'caption', only image, label" in found
    assert all("tokenizer" in text for text in more)
    (tmp_path / "b").mkdir()
    unlabelled = bare(glyphs / "train", tmp_path / "b", ("image",), ())
    found = problems(run_of("supervised", unlabelled), "x")
    assert any("has no field 'label'" in text for text in found)
    assert any("at least two classes" in text for text in found)


def test_a_field_that_the_objective_needs_and_nobody_asks_for(glyphs):
    (found,) = problems(run_of("supervised", f"{glyphs}/train", "data.fields=['image']"), "x")
    assert "'label' is not in the batch; add it to data.fields" in found
    (found,) = problems(run_of("simclr", f"{glyphs}/train", "data.image.views=1"), "x")
    assert "'image2' is not in the batch" in found


def test_a_vocabulary_that_is_too_small(words):
    (found,) = problems(run_of("clip", str(words), "objective.vocab=16"), "x")
    assert found.startswith("objective.vocab: 16 words, fewer than the ")


def test_a_token_at_which_no_text_ends(words):
    (found,) = problems(run_of("clip", str(words), "objective.end=7"), "x")
    assert found.startswith(
        "objective.end: token 7, but the tokenizer ends texts with '<end_of_text>', which is token 2"
    )
    assert problems(run_of("clip", str(words), "objective.end=7", "objective.text_pool=mean"), "x") == []
    (found,) = problems(run_of("clip", str(words), "data.captions.end=<pad>"), "x")
    assert "objective.end: token 2, but the tokenizer ends texts with '<pad>', which is token 0" in found


def test_special_tokens_beyond_the_vocabulary(glyphs, tmp_path):
    """A tokenizer's ids may have gaps: it has five, and the last is 600."""
    ids = {"<pad>": 0, "<start_of_text>": 1, "<end_of_text>": 600, "[UNK]": 3, "a": 4}
    made = Tokenizer(WordLevel(ids, unk_token="[UNK]"))
    made.save(str(tmp_path / "gaps.json"))
    settings = [f"data.captions.tokenizer={tmp_path}/gaps.json", "objective.end=600"]
    (found,) = problems(run_of("clip", f"{glyphs}/train", *settings), "x")
    assert found.startswith("objective.vocab: 512 words, fewer than the 601 of the tokenizer")
    assert problems(run_of("clip", f"{glyphs}/train", *settings, "objective.vocab=601"), "x") == []


def test_groups_that_hold_no_parameter(glyphs):
    """All of them, with what there is below the part of the prefix that there is."""
    groups = "optimizer.groups=[{prefix='encoder.backbone.blocks.9'}, {prefix='head'}, {prefix='encodr', frozen=true}]"
    found = problems(run_of("supervised", f"{glyphs}/train", groups), "x")
    assert [text.partition(" ")[0] for text in found] == ["optimizer.groups[0].prefix:", "optimizer.groups[2].prefix:"]
    assert "no parameter has this name" in found[0] and "encoder.backbone.blocks.0" in found[0]
    assert found[1].endswith("there are: encoder, head")


def test_mixed_sets_of_other_classes(glyphs, tmp_path):
    other = bare(glyphs / "val", tmp_path, ("image", "label"), tuple("abcdefgh"))
    mixed = f"data.train=[{{path='{glyphs}/train'}}, {{path='{other}'}}]"
    found = problems(run_of("supervised", "x", mixed), "x")
    assert any("labels of sources with different classes cannot be mixed" in text for text in found)


@pytest.mark.parametrize(("weights", "batch"), [((40, 1), 128), ((1, 1), 8), ((200, 1), 128)])
def test_samples_of_a_lopsided_mixture_are_of_all_its_parts(tmp_path, weights, batch):
    parts = [write_data(tmp_path / name, sizes).root for name, sizes in (("a", [90, 90]), ("b", [9]))]
    listed = ", ".join(f"{{path='{path}', weight={w}.0}}" for path, w in zip(parts, weights, strict=True))
    settings = [f"data.train=[{listed}]", f"run.global_batch={batch}", "data.image.size=8", "data.fields=['image']"]
    config = run_of("mae", "x", *settings)
    sample = sample_batch(config, manifests.load(config.data.train))
    assert len(sample["id"]) == len(sample["image"]) == 8 and (sample["id"] < 180).any()
    assert weights[0] > 1 or (sample["id"] >= 180).any()
