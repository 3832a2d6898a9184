"""``[start]``: a run begins with given weights, says what became of each tensor, and needs their origin only once."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from pipeline.config.schema import Start
from pipeline.core.errors import ConfigError
from pipeline.dist.group import process_group
from pipeline.run import start
from tests.contracts.components import CLASSES, build_objective, smoke_config
from tests.integration.runs import codes, notes, overrides, rank_body, run
from tests.integration.test_frozen import refused_by
from tests.ranks import start_ranks
from tests.unit.nn.test_matching import TINY, vit

STILL = ["optimizer.lr=1e-30", "run.length=1ba", "every.checkpoint=1ba", "engine.precision=fp32"]
"""One update that changes nothing."""


def test_a_run_starts_from_another_and_later_needs_it_no_more(glyphs, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    own = ["engine.name=accelerate", "engine.precision=fp32"]
    assert codes(run(1, "mae", overrides(first, glyphs / "train", "run.length=3ba", *own))) == [0]
    more = [f"start={{from='{first}'}}", "engine.name=accelerate", *STILL]
    assert codes(run(2, "supervised", overrides(second, glyphs / "train", *more))) == [0, 0]
    told = json.loads((second / "provenance.json").read_text())["start"]
    saved = first / "checkpoints" / "step-00000003"
    assert told["source"] == str(saved)
    assert told["counts"]["matched"] > 20 and told["names"]["missing"] == ["head.weight", "head.bias"]
    assert "starts from" in notes(second) and "missing: head.weight, head.bias" in notes(second)
    one, other = exported(first, tmp_path / "a"), exported(second, tmp_path / "b")
    backbone = {n.removeprefix("encoder."): t for n, t in one.items() if n.startswith("encoder.")}
    assert len(backbone) == told["counts"]["matched"]
    for name, tensor in backbone.items():
        torch.testing.assert_close(other[f"encoder.backbone.{name}"], tensor, rtol=0, atol=1e-20)
    shutil.rmtree(first)
    again = overrides(second, glyphs / "train", *more, "run.length=2ba")
    assert codes(run(1, "supervised", again)) == [0]
    assert json.loads((second / "provenance.json").read_text())["start"] == told


def exported(folder: Path, out: Path) -> dict[str, torch.Tensor]:
    (ended,) = start_ranks(1, _export, arguments=["--run", str(folder), "--out", str(out)])
    assert ended.problem is None, ended.problem
    return load_file(out / "objective.safetensors")


def _export(arguments: list[str]) -> int:
    from pipeline.run.__main__ import main

    return main(["export", *arguments])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("{from='nowhere'}", "start.from: nowhere is not there"),
        ("{from='FILE', skip=['haed.']}", "has nothing that begins with 'haed.'; it has encoder, head"),
        ("{from='FILE', weights='ema'}", 'start.weights = "ema" is of checkpoints'),
        ("{from='timm:vit_tinny'}", "timm has no model 'vit_tinny'"),
        ("{from='timm:vit_tiny_patch16_224'}", "are not stored on this machine, and nothing is downloaded"),
        ("{from='FILE'}", "nothing in FILE fits this model"),
    ],
)
def test_what_cannot_be_is_one_message(settings, said, glyphs, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    file = tmp_path / "w.safetensors"
    save_file({"some.weight": torch.ones(2)}, file)
    own = overrides(tmp_path / "run", glyphs / "train", f"start={settings.replace('FILE', str(file))}")
    config = Path(__file__).parents[2] / "configs" / "smoke" / "supervised.toml"
    text = refused_by(rank_body, tmp_path, config=str(config), settings=own, hurt=None)
    assert said.replace("FILE", str(file)) in text


def begin(objective, start_table, place, classes=CLASSES, tokenizer=None, name="supervised"):
    config = smoke_config(name).model_copy(update={"start": Start(**start_table)})
    return start.begin(objective, config, classes, tokenizer, place)


def test_timm_s_file_gives_timm_s_features(tmp_path):
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=9, **TINY["encoder_args"]).eval()
    with torch.no_grad():
        theirs.pos_embed.normal_()
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    objective = build_objective("supervised", **TINY)
    with process_group(timeout_minutes=1) as place:
        told = begin(objective, {"from": f"timm:vit_tiny_patch16_224={tmp_path / 'w.safetensors'}"}, place)
    assert "mean (0.5, 0.5, 0.5) and std (0.5, 0.5, 0.5), this run's are by (0.485" in told["remarks"][0]
    encoder = objective.eval().encoders()["image"]
    image = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    expected = theirs.forward_head(theirs.forward_features(encoder.normalize(image)), pre_logits=True)
    torch.testing.assert_close(encoder(image), expected)


@pytest.mark.parametrize(
    ("name", "evaluated", "other"),
    [("moco", "encoder", "momentum.encoder"), ("dino", "teacher.encoder", "encoder")],
)
def test_encoder_and_follower_start_alike_whichever_is_evaluated(name, evaluated, other, tmp_path):
    weights = vit()
    save_file(weights, tmp_path / "w.safetensors")
    objective = build_objective(name, **TINY)
    with torch.no_grad():
        for parameter in objective.get_submodule(other).parameters():
            parameter.zero_()
    with process_group(timeout_minutes=1) as place:
        told = begin(objective, {"from": str(tmp_path / "w.safetensors")}, place, name=name)
    found, follower = (dict(objective.get_submodule(m).named_parameters()) for m in (evaluated, other))
    assert found.keys() == follower.keys() and told["counts"]["followed"] == len(found)
    assert all(torch.equal(found[n], follower[n]) for n in found)
    assert torch.equal(found["backbone.blocks.0.attn.qkv.weight"], weights["blocks.0.attn.qkv.weight"])


def test_a_classifier_is_only_taken_for_its_own_classes(tmp_path, monkeypatch):
    one, other = build_objective("supervised"), build_objective("supervised")
    known = start.Source("there", dict(one.state_dict()), "0", CLASSES)
    with process_group(timeout_minutes=1) as place:
        for classes, fits in ((CLASSES, True), (CLASSES[::-1], False), ((), False)):
            monkeypatch.setattr(start, "_open", lambda *_, classes=classes: replace(known, classes=classes))
            if fits:
                assert begin(other, {"from": "x"}, place)["counts"]["missing"] == 0
            else:
                with pytest.raises(ConfigError, match=r'has a classifier \(head.weight\).*start.skip = \["head."\]'):
                    begin(other, {"from": "x"}, place)
                assert begin(other, {"from": "x", "skip": ["head."]}, place)["counts"]["skipped"] == 2


def test_words_are_only_taken_with_their_tokenizer(monkeypatch):
    one, other = build_objective("clip"), build_objective("clip")
    known = start.Source("there", dict(one.state_dict()), "0", tokenizer=b"theirs")
    monkeypatch.setattr(start, "_open", lambda *_: known)
    monkeypatch.setattr(start, "TextDecoder", lambda captions, file, seed: Named(file.decode()))
    with process_group(timeout_minutes=1) as place:
        with pytest.raises(ConfigError, match=r"another tokenizer \(theirs\).*\(ours\).*start.skip = \[\"text.\"\]"):
            begin(other, {"from": "x"}, place, tokenizer=b"ours", name="clip")
        assert begin(other, {"from": "x"}, place, tokenizer=b"theirs", name="clip")["counts"]["missing"] == 0
        told = begin(other, {"from": "x", "skip": ["text."]}, place, tokenizer=b"ours", name="clip")
        assert all(name.startswith("text.") for name in told["names"]["skipped"])


class Named:
    """In place of a tokenizer: its file's content is its hash."""

    def __init__(self, sha256: str) -> None:
        self.sha256 = sha256
