"""Outputs of teachers, stored once: a student that reads them learns what one beside its teacher does."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from pipeline.core.manifest import load
from tests.integration.runs import SMOKE, codes, metrics, overrides, rank_body, same_course
from tests.integration.test_frozen import refused_by
from tests.ranks import start_ranks

TEACHER = {
    "encoder": "vit_tiny_patch16_224",
    "encoder_args": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
}


def write_teacher(path: Path, shards: Path, seed: int = 1) -> None:
    """A supervised objective as `sluice export` writes it."""
    import json

    import torch

    from pipeline.core.protocols import DataFacts
    from pipeline.nn.weights import save
    from pipeline.objectives.supervised import Config, Supervised
    from tests.contracts.components import smoke_config

    torch.manual_seed(seed)
    facts = DataFacts((32, 32), load(shards).classes)
    config = smoke_config("supervised").model_dump(mode="json") | {"objective": {"name": "supervised", **TEACHER}}
    about = {"config": json.dumps(config), "facts": json.dumps(facts.plain())}
    save(path, Supervised(Config(**TEACHER, head_std=0.5), facts).state_dict(), about)


def config_of(folder: Path, *, stored: str = "") -> Path:
    """The smallest distillation, live or by stored outputs."""
    text = (SMOKE / "distill.toml").read_text().replace(', block = "blocks.0"', "")
    text = text.replace("[data]\n", "[data]\naugmentations = 2\n")
    if stored:
        text = text.replace('fields = ["image", "label"]', 'fields = ["image", "label", "big"]')
        text += f'\n[data.field.big]\nname = "stored"\nsidecar = "out"\n[data.sidecar.out]\npath = "{stored}"\n'
        text = text.replace("[objective.teachers.only]\n", '[objective.teachers.only]\nstored = "big"\n')
    path = folder / f"{Path(stored).name or 'live'}.toml"
    path.write_text(text)
    return path


def embed_body(config: str, settings: list[str], dies_at: int | None, top: int | None) -> int:
    """One rank of `sluice prep embed`, with shards of 10 samples."""
    from pipeline.run import embed
    from pipeline.run.__main__ import main

    embed.SHARD = 10
    if dies_at is not None:
        write = embed.SidecarWriter.write

        def then_die(self, number, keys, members):
            if number >= dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            write(self, number, keys, members)

        embed.SidecarWriter.write = then_die
    words = [word for setting in settings for word in ("--set", setting)]
    more = [] if top is None else ["--top", str(top)]
    return main(["embed", "--config", config, "--precision", "float32", *words, *more])


def embed(world: int, config: Path, settings: list[str], dies_at: int | None = None, top: int | None = None):
    body = {"config": str(config), "settings": settings, "dies_at": dies_at, "top": top}
    return codes(start_ranks(world, embed_body, **body))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def there(glyphs, tmp_path_factory):
    """Teacher, configuration and settings of runs; its outputs are stored."""
    folder = tmp_path_factory.mktemp("embed")
    teacher = folder / "teacher.safetensors"
    write_teacher(teacher, glyphs / "train")
    own = [f"data.train='{glyphs / 'train'}'", f"objective.teachers.only.weights='{teacher}'"]
    config = config_of(folder, stored=str(folder / "out"))
    assert embed(2, config, own) == [0, 0]
    return folder, config, own


def trained(world: int, config: Path, folder: Path, shards: Path, teacher: Path, *more: str):
    settings = overrides(folder, shards, f"objective.teachers.only.weights='{teacher}'", "optimizer.clip=10.0", *more)
    return codes(start_ranks(world, rank_body, config=str(config), settings=settings, hurt=None))


def test_a_student_of_stored_outputs_learns_what_one_beside_its_teacher_does(there, glyphs, tmp_path):
    folder, config, _ = there
    shards, teacher = glyphs / "train", folder / "teacher.safetensors"
    long = ("run.length=20ba", "run.global_batch=16", "engine.micro_batch=8")  # third epoch: augmentations come again
    assert trained(1, config_of(tmp_path), tmp_path / "live", shards, teacher, *long) == [0]
    elsewhere = tmp_path / "nowhere.safetensors"  # the file need not be there
    assert trained(2, config, tmp_path / "stored", shards, elsewhere, *long) == [0, 0]
    same_course(tmp_path / "stored", tmp_path / "live", slack=10.0)
    names = {name for name in metrics(tmp_path / "live")[1] if name.startswith(("loss", "agreement"))}
    assert {"loss_kl", "loss_hint", "loss_distances", "loss_contrast", "agreement_only"} <= names
    for line, other in zip(*(metrics(tmp_path / run).values() for run in ("live", "stored")), strict=True):
        assert {n: line[n] for n in names} == pytest.approx({n: other[n] for n in names}, rel=1e-3, abs=1e-6)


def test_what_is_stored_does_not_depend_on_ranks_and_deaths(there, tmp_path):
    folder, _, own = there
    config = config_of(tmp_path, stored=str(tmp_path / "again"))
    assert embed(1, config, own, dies_at=5) == [-signal.SIGKILL]
    assert len(list((tmp_path / "again").glob("*.tar"))) == 5
    assert embed(1, config, own) == [0]
    assert files(tmp_path / "again") == files(folder / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "again").iterdir()}
    assert embed(1, config, own) == [0]
    part = [*own, "data.held_out={part='held_out', share=0.3}"]  # all of its samples have outputs already
    assert embed(1, config, part) == [0]
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "again").iterdir()}


@pytest.mark.parametrize("dies_at", [None, 1])
def test_outputs_of_a_part_are_not_taken_for_those_of_more(there, tmp_path, dies_at):
    """Neither when all are there, nor to go on from: shards are cut from the part."""
    _, _, own = there
    config = str(config_of(tmp_path, stored=str(tmp_path / "part")))
    body = {"config": config, "dies_at": None, "top": None}
    part = [*own, "data.held_out={part='held_out', share=0.5}"]
    if dies_at is None:
        assert embed(1, Path(config), part) == [0]
    else:
        assert embed(1, Path(config), part, dies_at=dies_at) == [-signal.SIGKILL]
    before = files(tmp_path / "part") if dies_at is None else None
    said = refused_by(embed_body, tmp_path, settings=own, **body)
    assert f"{tmp_path / 'part'} was made otherwise (of.fingerprint: " in said and "; of.samples: " in said
    assert "remove it, or write into a new folder" in said
    assert before is None or before == files(tmp_path / "part")


def test_another_teacher_or_other_crops_are_refused(there, glyphs, tmp_path):
    folder, config, own = there
    other = tmp_path / "other.safetensors"
    write_teacher(other, glyphs / "train", seed=2)
    run = overrides(tmp_path / "run", glyphs / "train", f"objective.teachers.only.weights='{other}'")
    for settings, said in (
        ([], "other.safetensors is changed: its sha256 is"),
        (["data.image.scale=[0.5, 1.0]"], "of images with data.image.scale = [0.2, 1.0], not [0.5, 1.0]"),
    ):
        assert said in refused_by(rank_body, tmp_path, config=str(config), settings=[*run, *settings], hurt=None)
    body = {"config": str(config), "settings": own[:1] + run[-1:], "dies_at": None, "top": None}
    said = refused_by(embed_body, tmp_path, **body)
    assert f"{folder / 'out'} was made otherwise (embedded.teacher.path: " in said
    live = body | {"config": str(config_of(tmp_path))}
    assert "no teacher has 'stored'" in refused_by(embed_body, tmp_path, **live)


def test_a_sample_that_cannot_be_read_has_no_outputs(there, tmp_path):
    """The top logits alone are stored here."""
    from tests.unit.data.shards import encode, members, picture, write_data

    def some(number):
        return members(number) | ({"png": b"no image"} if number == 3 else {"png": encode(picture(number, (32, 32)))})

    shards = write_data(tmp_path / "shards", [12], some)
    write_teacher(tmp_path / "teacher.safetensors", tmp_path / "shards")
    config = config_of(tmp_path, stored=str(tmp_path / "out"))
    own = [f"data.train='{shards.root}'", f"objective.teachers.only.weights='{tmp_path / 'teacher.safetensors'}'"]
    assert embed(1, config, own, top=2) == [0]
    made = load(tmp_path / "out")
    assert made.samples == 11 and list(made.fields) == ["out.npy", "top.npy"]
    assert made.made["embedded"]["top"] == 2
