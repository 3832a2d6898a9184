"""Zero-shot classification against counting by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pipeline.config.schema import Component
from pipeline.core.components import check_component
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.evaluation import Table
from pipeline.evals.zero_shot import Config, ZeroShot
from tests.contracts.components import ListStream, context, numbers
from tests.unit.evals.test_retrieval import CLASSES, N, cosine, encoders, stream


def test_the_nearest_name_is_the_one_counted_by_hand(lone_group):
    towers, label = encoders(), stream().label.tolist()
    image, text = towers["image"].rows.detach(), towers["text"].rows.detach()
    near = [[cosine(i, t) for t in text] for i in image]
    right = [max(range(CLASSES), key=row.__getitem__) == own for row, own in zip(near, label, strict=True)]
    per_class = [[r for r, own in zip(right, label, strict=True) if own == c] for c in range(CLASSES)]
    evaluation, ctx = ZeroShot(Config(templates=("a {}", "the {}."))), context(towers, {"val": stream()})
    values = {r.name: (r.value, r.n) for r in numbers(evaluation, ctx).values()}
    assert values == {
        "zero_shot/top1": (pytest.approx(sum(right) / N), N),
        "zero_shot/top5": (1.0, N),
        "zero_shot/mean_per_class_recall": (pytest.approx(sum(sum(c) / len(c) for c in per_class) / CLASSES), N),
    }
    assert 0.05 < values["zero_shot/top1"][0] < 0.6
    with torch.no_grad():
        (table,) = [output for output in evaluation.run(ctx) if output.name == "zero_shot/classes"]
    expected = [(f"class {c}", len(own), pytest.approx(sum(own) / len(own))) for c, own in enumerate(per_class)]
    assert list(table.rows) == expected and table.columns == ("class", "images", "recall")


class Templates(torch.nn.Module):
    """A vector that depends on the sentence and not on the name alone."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = torch.nn.Parameter(torch.tensor([[3.0, 0.0], [0.0, 1.0], [4.0, 3.0], [-2.0, 2.0]]))

    def forward(self, text: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        return self.rows[text[:, 0]]


def test_sentences_of_a_class_are_averaged_as_unit_vectors(lone_group):
    def read(texts):
        assert texts == ["a x", "x!", "a y", "y!"]
        return {"text": torch.arange(4)[:, None], "text_length": torch.ones(4, dtype=torch.int64)}

    ctx = replace(context({"text": Templates()}, {}), tokenize=read)
    with torch.no_grad():
        found = ZeroShot(Config(templates=("a {}", "{}!"))).class_vectors(ctx, [("x",), ("y",)])
    half = 0.5**0.5
    second = torch.tensor([0.8 - half, 0.6 + half])
    torch.testing.assert_close(found, torch.stack([torch.tensor([half, half]), second / second.norm()]))


def test_several_names_of_a_class_are_one_more_ensemble(lone_group):
    """Four sentences of the first class, two of the second: the mean of unit vectors of each."""

    def read(texts):
        assert texts == ["a x", "x!", "a y", "y!", "a z", "z!"]
        return {"text": torch.tensor([[0], [1], [2], [3], [2], [0]]), "text_length": torch.ones(6, dtype=torch.int64)}

    config = Config.model_validate({"templates": ("a {c}", "{}!"), "names": {"First": ["x", "y"], "second": "z"}})
    evaluation, ctx = ZeroShot(config), replace(context({"text": Templates()}, {}), tokenize=read)
    assert evaluation.called(("First", "second", "third")) == [("x", "y"), ("z",), ("third",)]
    with torch.no_grad():
        found = evaluation.class_vectors(ctx, evaluation.called(("First", "second")))
    unit = Templates().rows.detach() / torch.tensor([3.0, 1.0, 5.0, 8.0**0.5])[:, None]
    first, second = unit.mean(0), unit[[2, 0]].mean(0)
    torch.testing.assert_close(found, torch.stack([first / first.norm(), second / second.norm()]))


def test_names_and_templates_come_from_files_and_are_the_setting_itself(tmp_path):
    (tmp_path / "names.txt").write_text("a cat\n\n a dog \n")
    (tmp_path / "names.json").write_text('{"n01": "cat", "n02": ["dog", "hound"]}')
    (tmp_path / "templates.txt").write_text("a {c}.\nthe {}\n")
    lines = Config.model_validate({"names": f"{tmp_path}/names.txt", "templates": f"{tmp_path}/templates.txt"})
    assert lines.names == ("a cat", "a dog") and lines.templates == ("a {c}.", "the {}")
    table = Config.model_validate({"names": f"{tmp_path}/names.json"})
    assert table.names == {"n01": ("cat",), "n02": ("dog", "hound")}
    assert Config.model_validate_json(table.model_dump_json()) == table
    with pytest.raises(ValueError, match=r"cannot read nowhere\.txt"):
        Config.model_validate({"names": "nowhere.txt"})


def test_settings_are_read_from_a_suite():
    """As TOML has them: lists, and tables of names or lists of them."""
    for names, expected in (({"a": "x", "b": ["y", "z"]}, {"a": ("x",), "b": ("y", "z")}), (["p", "q"], ("p", "q"))):
        component = Component.model_validate({"name": "zero_shot", "templates": ["a {}", "the {}"], "names": names})
        config = check_component("pipeline.evals", component, "a suite", ("evals",))
        assert config == Config(templates=("a {}", "the {}"), names=expected)


def test_names_that_fit_no_class_are_refused(lone_group):
    ctx = context(encoders(), {"val": stream()})
    with pytest.raises(ConfigError, match="stream 'val' has no class 'cat'; it has 'class 0'"):
        numbers(ZeroShot(Config.model_validate({"names": {"cat": "a cat"}})), ctx)
    with pytest.raises(ConfigError, match="2 names for the 5 classes"):
        numbers(ZeroShot(Config(names=("a", "b"))), ctx)


class Several(ListStream):
    """With any number of classes of each image, drawn at random; nothing is of the last class."""

    def __init__(self) -> None:
        super().__init__(stream().image, stream().label)
        self.labels = torch.rand(N, CLASSES, generator=torch.Generator().manual_seed(0)) < 0.4
        self.labels[:, -1] = False

    def __iter__(self):
        return (batch | {"labels": self.labels[batch["id"]].to(torch.uint8)} for batch in super().__iter__())


def test_classes_of_several_labels_are_ranked_one_by_one(lone_group):
    """Average precision by its definition: the mean over an image's places of the precision down to there."""
    towers, data = encoders(), Several()
    image, text = towers["image"].rows.detach(), towers["text"].rows.detach()
    expected = []
    for c in range(CLASSES - 1):
        order = sorted(range(N), key=lambda i, c=c: -cosine(image[i], text[c]))
        hits = [bool(data.labels[i, c]) for i in order]
        expected.append(sum(sum(hits[: k + 1]) / (k + 1) for k in range(N) if hits[k]) / sum(hits))
    evaluation, ctx = ZeroShot(Config(templates=("a {}",), field="labels")), context(towers, {"val": data})
    found = numbers(evaluation, ctx)
    assert list(found) == ["zero_shot/mean_average_precision"]
    assert found["zero_shot/mean_average_precision"].value == pytest.approx(sum(expected) / len(expected))
    with torch.no_grad():
        (table,) = [output for output in evaluation.run(ctx) if isinstance(output, Table)]
    assert [row[2] for row in table.rows] == pytest.approx(expected) and len(set(expected)) == CLASSES - 1
    data.labels[:] = False
    with pytest.raises(DataError, match="no image of stream 'val' has any of its labels"):
        numbers(evaluation, context(towers, {"val": data}))


def test_a_template_needs_a_place_for_the_name():
    with pytest.raises(ValueError, match=r"has no \{\}"):
        Config(templates=("a photo",))
