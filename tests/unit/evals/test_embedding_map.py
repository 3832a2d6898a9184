"""Maps of features: the same every time, true to their neighbours, and readable for TensorBoard's projector."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pipeline.core.errors import DataError
from pipeline.core.evaluation import Figure
from pipeline.evals import embedding_map
from pipeline.evals.embedding_map import Config, EmbeddingMap
from tests.contracts.components import ListStream, context
from tests.unit.evals.test_knn import Identity


def streams() -> dict[str, ListStream]:
    """Four clouds far from each other; "far" has two of them and one of its own, under other numbers."""
    generator = torch.Generator().manual_seed(0)
    centre = 6 * torch.randn(5, 8, generator=generator)
    label = torch.arange(60) % 4
    val = ListStream(centre[label] + torch.randn(60, 8, generator=generator), label)
    other = torch.arange(33) % 3
    far = ListStream(centre[torch.tensor([3, 1, 4])[other]] + torch.randn(33, 8, generator=generator), other)
    far.classes = ("class 3", "class 1", "class 9")
    return {"val": val, "far": far}


def drawn(folder, monkeypatch, **settings):
    """Outputs, and what was handed to be drawn: place and kind of each point, names."""
    clouds = []
    kept = embedding_map.cloud
    monkeypatch.setattr(embedding_map, "cloud", lambda *given: clouds.append(given) or kept(*given))
    evaluation = EmbeddingMap(Config(**{"perplexity": 8.0} | settings))
    data = {name: own for name, own in streams().items() if name in evaluation.uses().streams}
    with torch.no_grad():
        outputs = list(evaluation.run(context({"image": Identity()}, data, folder=folder)))
    monkeypatch.setattr(embedding_map, "cloud", kept)
    return outputs, clouds


def unit(name: str) -> np.ndarray:
    x = streams()[name].image.double().numpy()
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def trust(x: np.ndarray, place: np.ndarray, k: int = 5) -> float:
    """Venna and Kaski's formula, a point at a time."""
    n, penalty = len(x), 0
    for i in range(n):
        far = np.argsort(np.linalg.norm(x - x[i], axis=1), kind="stable")
        rank = {int(j): r for r, j in enumerate(j for j in far if j != i)}
        near = [int(j) for j in np.argsort(np.linalg.norm(place - place[i], axis=1), kind="stable") if j != i][:k]
        penalty += sum(max(0, rank[j] + 1 - k) for j in near)
    return 1 - 2 * penalty / (n * k * (2 * n - 3 * k - 1))


def test_maps_show_all_samples_by_class_and_by_stream(tmp_path, lone_group, monkeypatch):
    outputs, clouds = drawn(tmp_path / "own", monkeypatch, beside=("far",))
    figures = [o.name.partition("/")[2] for o in outputs if isinstance(o, Figure)]
    assert figures == ["pca_classes", "pca_domains", "tsne_classes", "tsne_domains"]
    values = {o.name: o.value for o in outputs if not isinstance(o, Figure)}
    x = np.concatenate([unit("val"), unit("far")])
    _, s, axes = np.linalg.svd(x - x.mean(0), full_matrices=False)
    (pca, kind, names), (_, domain, shown), (tsne, *_), _ = clouds
    expected = (x - x.mean(0)) @ axes[:2].T
    np.testing.assert_allclose(np.abs(pca), np.abs(expected), atol=1e-9)
    assert values["embedding_map/pca_variance"] == pytest.approx((s[:2] ** 2).sum() / (s**2).sum())
    assert [names[k] for k in kind] == [
        *(f"class {i % 4}" for i in range(60)), *(("class 3", "class 1", "class 9")[i % 3] for i in range(33))
    ]  # fmt: skip
    assert domain.tolist() == [0] * 60 + [1] * 33 and shown == ("val", "far")
    for way, place in (("pca", pca), ("tsne", tsne)):
        assert values[f"embedding_map/{way}_trustworthiness"] == pytest.approx(trust(x, place), abs=1e-9)
    assert values["embedding_map/tsne_trustworthiness"] > 0.9
    near = np.array([np.argsort(np.linalg.norm(tsne - p, axis=1))[1] for p in tsne])
    assert (kind[near] == kind).mean() > 0.95  # clouds stay together


def test_the_same_every_time_and_by_seed(tmp_path, lone_group, monkeypatch):
    one, again = (drawn(tmp_path, monkeypatch, maps=("tsne",))[0] for _ in range(2))
    assert np.array_equal(one[-1].image, again[-1].image) and one[0].value == again[0].value


def test_the_projector_finds_vectors_and_what_is_known_of_them(tmp_path, lone_group, monkeypatch):
    drawn(tmp_path / "new" / "folder", monkeypatch, beside=("far",), samples=20)
    folder = tmp_path / "new" / "folder"
    vectors = np.loadtxt(folder / "vectors.tsv", delimiter="\t")
    head, *rows = [line.split("\t") for line in (folder / "metadata.tsv").read_text().splitlines()]
    assert head == ["class", "stream", "sample"] and len(rows) == len(vectors) == 40
    for name, part in (("val", slice(0, 20)), ("far", slice(20, 40))):
        samples = [int(row[2]) for row in rows[part]]
        assert {row[1] for row in rows[part]} == {name} and samples == sorted(set(samples)) and samples[-1] > 30
        np.testing.assert_allclose(vectors[part], unit(name)[samples], atol=1e-5)
        assert [row[0] for row in rows[part]] == [streams()[name].classes[streams()[name].label[i]] for i in samples]
    from google.protobuf import text_format
    from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

    config = text_format.Parse((folder / "projector_config.pbtxt").read_text(), ProjectorConfig())
    (embedding,) = config.embeddings
    assert (embedding.tensor_path, embedding.metadata_path) == ("vectors.tsv", "metadata.tsv")


def test_what_makes_no_sense_is_refused(tmp_path, lone_group):
    with pytest.raises(ValidationError, match="named twice"):
        Config(beside=("val",))
    few = ListStream(torch.randn(9, 8), torch.arange(9) % 2)
    with torch.no_grad(), pytest.raises(DataError, match="stream 'val' has 9 samples; a map needs 10"):
        list(EmbeddingMap(Config()).run(context({"image": Identity()}, {"val": few}, folder=tmp_path)))
