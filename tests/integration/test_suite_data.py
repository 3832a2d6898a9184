"""Suites on any subject and any data: weights of others, image folders, parts of data sets, fields with settings."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image as PillowImage
from safetensors.torch import save_file

from pipeline.core import manifest as manifests
from pipeline.data.dataset import keys_of
from pipeline.record.results import Row, read_results
from pipeline.run.__main__ import main
from tests.ranks import start_ranks
from tests.unit.data.shards import encode, picture, write_data

KNN = '[[evals]]\nname = "knn"\nk = [1]\n'
COUNT = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with scores and without labels, a sidecar with other scores, and the same pictures in class folders."""
    folder = tmp_path_factory.mktemp("data")
    fields = {"image": ("png",), "label": ("cls",), "metadata": ("json",)}
    for name, base in (("train", 0), ("val", 100)):
        write_data(
            folder / name,
            [COUNT - 5, 5],
            lambda n, base=base: {
                "cls": str(n % 3).encode(),
                "png": encode(picture(n + base)),
                "json": json.dumps({"score": n / 10}).encode(),
            },
            fields,
        )
        for n in range(COUNT):
            place = folder / "images" / name / f"c{n % 3}" / f"{n:03d}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            PillowImage.open(io.BytesIO(encode(picture(n + base)))).save(place)
    easy = [json.dumps({"easy": n % 2}).encode() for n in range(COUNT)]
    write_data(folder / "side", [COUNT], lambda n: {"json": easy[n]}, {"metadata": ("json",)})
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A subject of timm."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), file)
    return f"timm:test_resnet={file}"


def suite(folder: Path, streams: str, more: str = "", evals: str = KNN) -> str:
    folder.mkdir(exist_ok=True)
    text = f"workers = 0\nbatch = 4\nimage = {{size = 32, crop = 'resize'}}\n{more}\n[streams]\n{streams}\n{evals}"
    (folder / "suite.toml").write_text(text)
    return str(folder / "suite.toml")


def evaluate(subject: str, named: str, out: Path, *more: str) -> int:
    return main(["eval", "--run", subject, "--suite", named, "--out", str(out), *more])


def top1(folder: Path) -> list[Row]:
    return [row for row in read_results(folder).rows if row.metric.startswith("knn/top1")]


def test_images_without_classes_are_named_by_their_folder(data, weights, tmp_path, capsys):
    """Not by the shards that were made of them in a cache."""
    flat = tmp_path / "flat"
    flat.mkdir()
    for image in sorted((data / "images/val/c0").iterdir()):
        (flat / image.name).write_bytes(image.read_bytes())
    named = suite(tmp_path / "suite", f'train = "{flat}"\nval = "{flat}"')
    assert evaluate(weights, named, tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert f"needs the field 'label' of stream 'train': {flat} has no field 'label', only image" in said


def test_a_folder_of_images_gives_the_number_that_shards_of_it_give(data, weights, tmp_path):
    for name, root in (("shards", data), ("folders", data / "images")):
        assert evaluate(weights, suite(tmp_path, f'train = "{root}/train"\nval = "{root}/val"'), tmp_path / name) == 0
    split = f'train = {{path = "{data}/images", split = "train"}}\nval = {{path = "{data}/images", split = "val"}}'
    assert evaluate(weights, suite(tmp_path, split), tmp_path / "folders") == 0
    (shards,), (folders,) = top1(tmp_path / "shards"), top1(tmp_path / "folders")
    assert (shards.value, shards.n) == (folders.value, folders.n) and folders.n == COUNT
    assert shards.model == "timm:test_resnet=w.safetensors"


def in_a_rank(subject: str, named: str, out: Path) -> int:
    return evaluate(subject, named, out)


def test_ranks_share_what_the_first_one_makes(data, weights, tmp_path, cache):
    images = f'train = "{data}/images/train"\nval = "{data}/images/val"'
    ended = start_ranks(2, in_a_rank, subject=weights, named=suite(tmp_path, images), out=tmp_path / "two")
    assert [(e.problem, e.value) for e in ended] == [(None, 0)] * 2
    assert evaluate(weights, suite(tmp_path, images), tmp_path / "one") == 0
    (two,), (one,) = top1(tmp_path / "two"), top1(tmp_path / "one")
    assert (two.value, two.n) == (one.value, one.n)


PARTS = {
    "where": ('where = "score < 0.45"', 5),
    "keep": ('keep = "{folder}/kept.txt"', 4),
    "sidecar": ('where = "`s:easy` == 1"\nsidecar = {{s = {{path = "{data}/side"}}}}', 6),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_a_data_set_is_another_data_set(part, data, weights, tmp_path, capsys):
    keys = keys_of(manifests.load(data / "val"))[[0, 3, 7, 11]]
    (tmp_path / "kept.txt").write_text("\n".join(key.decode() for key in keys))
    how, count = PARTS[part]
    how = how.format(folder=tmp_path, data=data).replace("\n", ", ")
    whole = suite(tmp_path, f'train = "{data}/train"\nval = "{data}/val"')
    assert evaluate(weights, whole, tmp_path / "out") == 0
    some = suite(tmp_path, f'train = "{data}/train"\nval = {{path = "{data}/val", {how}}}')
    assert evaluate(weights, some, tmp_path / "out") == 0
    assert sorted(row.n for row in top1(tmp_path / "out")) == sorted([count, COUNT])
    assert len({json.dumps(row.manifests, sort_keys=True) for row in top1(tmp_path / "out")}) == 2
    capsys.readouterr()
    assert evaluate(weights, some, tmp_path / "out") == 0
    assert "1 of 1 were there already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ('where = "beauty >"', "val.where"),
        ('keep = "nowhere.txt"', "cannot read nowhere.txt"),
        ('where = "score > 9"', "none is kept"),
        ('sidecar = {s = {path = "nowhere"}}', "no manifest at nowhere"),
        ('split = "test"', "name the folder of the split itself"),
        ('torchvision = "CIFAR10", split = "test"', "CIFAR10 is not at"),
    ],
)
def test_a_part_that_cannot_be_had_is_said(part, says, data, weights, tmp_path, capsys):
    named = suite(tmp_path, f'train = "{data}/train"\nval = {{path = "{data}/val", {part}}}')
    assert evaluate(weights, named, tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert says in said and "Traceback" not in said, said


def test_fields_may_be_set_where_they_are_wanted(data, weights, tmp_path, capsys):
    streams = f'train = "{data}/train"\nval = "{data}/val"'
    more = 'fields = ["image", "label", "difficulty"]'
    field = '[field.difficulty]\nname = "metadata"\ncolumns = ["score"]\n'
    assert evaluate(weights, suite(tmp_path, streams, more, field + KNN), tmp_path / "out") == 0
    unused = suite(tmp_path, streams, more, field.replace("difficulty", "mask") + KNN)
    assert evaluate(weights, unused, tmp_path / "out") == 2
    assert "field.mask sets a field that is not wanted" in capsys.readouterr().err


RETRIEVAL = '[[evals]]\nname = "retrieval"\n'
FIELDS = 'fields = ["image", "label", "text"]'


@pytest.mark.parametrize(
    ("subject", "evals", "more", "says"),
    [
        ("{weights}", RETRIEVAL, FIELDS, "needs the encoder 'text'"),
        ("{weights}", '[[evals]]\nname = "frechet"\nsamples = 8\n', "", "needs a model that judges"),
        ("{weights}", '[[evals]]\nname = "samples"\nsamples = 8\n', "", "needs the encoder 'generator'"),
        ("random:test_resnet", '[[evals]]\nname = "accuracy"\n', "", "needs the encoder 'logits'"),
        ("{weights}", '[[evals]]\nname = "accuracy"\n', "", "has samples of class"),
    ],
)
def test_what_a_subject_has_not_got(subject, evals, more, says, data, weights, tmp_path, capsys):
    named = suite(tmp_path, f'train = "{data}/train"\nval = "{data}/val"', more, evals)
    code = evaluate(subject.format(weights=weights), named, tmp_path / "out")
    said = capsys.readouterr().err
    assert code in (1, 2) and says in said and "Traceback" not in said, said


@pytest.mark.parametrize(
    ("subject", "says"),
    [
        ("nowhere", "there is no nowhere"),
        ("timm:test_vit={file}", "is not of timm's 'test_vit'"),
        ("timm:tset_vit={file}", "timm has no model 'tset_vit'"),
        ("random:tset_vit", "timm has no model 'tset_vit'"),
    ],
)
def test_a_subject_that_cannot_be_had_is_said_and_others_are_measured(subject, says, data, weights, tmp_path, capsys):
    named = suite(tmp_path, f'train = "{data}/train"\nval = "{data}/val"')
    file = weights.partition("=")[2]
    code = evaluate(subject.format(file=file), named, tmp_path / "out", "--run", weights)
    said = capsys.readouterr().err
    assert says in said and "Traceback" not in said
    assert code == (2 if subject == "nowhere" else 1)
    assert len(top1(tmp_path / "out")) == (0 if code == 2 else 1)


def test_weights_of_others_need_a_place_for_results(data, weights, tmp_path, capsys):
    named = suite(tmp_path, f'train = "{data}/train"\nval = "{data}/val"')
    assert main(["eval", "--run", weights, "--suite", named]) == 2
    assert "say where its results go, --out" in capsys.readouterr().err


def test_a_judge_may_be_any_subject(data, weights, tmp_path, capsys):
    streams = f'train = "{data}/train"\nval = "{data}/val"'
    several = suite(tmp_path, streams, more='judge = "timm:test_vit=nowhere.safetensors"')
    assert evaluate(weights, several, tmp_path / "out") == 1
    assert "nowhere.safetensors is not there" in capsys.readouterr().err
    assert evaluate(weights, suite(tmp_path, streams, more='judge = "random:test_vit"'), tmp_path / "out") == 0
