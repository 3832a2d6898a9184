"""Retrieval against counting by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.core.errors import DataError
from pipeline.core.evaluation import Figure
from pipeline.dist.group import process_group
from pipeline.evals import retrieval
from pipeline.evals.retrieval import Config as RetrievalConfig
from pipeline.evals.retrieval import Retrieval, best_ranks
from pipeline.nn.pictures import verdict
from tests.contracts.components import ListStream, context, numbers
from tests.ranks import start_ranks

N, CLASSES, WIDTH = 37, 5, 4


class Table(nn.Module):
    """The row of a table that a sample's first pixel or token names."""

    def __init__(self, seed: int, rows: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.rows = nn.Parameter(torch.randn(rows, WIDTH, generator=generator))

    def forward(self, x: Tensor, length: Tensor | None = None) -> Tensor:
        return self.rows[x.flatten(1)[:, 0].long()]


def stream(rank: int = 0, world: int = 1) -> ListStream:
    image = torch.arange(N, dtype=torch.uint8).view(N, 1, 1, 1)
    return ListStream(image, torch.arange(N) * 3 % CLASSES, rank, world)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / a.norm() / b.norm())


def encoders() -> dict[str, Table]:
    return {"image": Table(0, N), "text": Table(1, CLASSES)}


def measured(rank: int = 0, world: int = 1) -> dict[str, tuple[float, int]]:
    found = numbers(Retrieval(RetrievalConfig(k=(1, 3, 20, 37))), context(encoders(), {"val": stream(rank, world)}))
    return {r.name: (r.value, r.n) for r in found.values()}


def by_hand() -> dict[str, tuple[float, int]]:
    towers, label = encoders(), stream().label.tolist()
    image, text = towers["image"].rows.detach(), towers["text"].rows.detach()
    near = [[cosine(i, t) for t in text] for i in image]
    found = {}
    for k in (1, 3):
        hits = [
            own in sorted(range(CLASSES), key=lambda c, r=row: -r[c])[:k] for row, own in zip(near, label, strict=True)
        ]
        found[f"retrieval/top{k}_text"] = (sum(hits) / N, N)
    for k in (1, 3, 20):
        hits = [
            any(label[i] == c for i in sorted(range(N), key=lambda i, c=c: -near[i][c])[:k]) for c in range(CLASSES)
        ]
        found[f"retrieval/top{k}_image"] = (sum(hits) / CLASSES, CLASSES)
    return found


def test_hits_are_those_counted_by_hand(lone_group):
    expected = by_hand()
    found = measured()
    assert found.keys() == expected.keys()
    for name, (value, n) in expected.items():
        assert found[name] == (pytest.approx(value), n), name
    assert 0.05 < found["retrieval/top3_text"][0] < 0.95


def five_rows_an_image() -> tuple[ListStream, list[list[int]]]:
    """Seven images with five captions each in rows that are mixed; two images share a caption, one has one twice."""
    captions = [[5 * i + j for j in range(5)] for i in range(7)]
    captions[3][0], captions[4][1] = captions[2][2], captions[4][0]
    rows = [(i, c) for i, own in enumerate(captions) for c in own]
    rows = [rows[j * 13 % len(rows)] for j in range(len(rows))]
    image = torch.tensor([i for i, _ in rows], dtype=torch.uint8).view(-1, 1, 1, 1)
    stream = ListStream(image, torch.tensor([c for _, c in rows]))
    stream.classes = tuple(f"class {c}" for c in range(35))
    return stream, captions


@pytest.mark.parametrize("perfect", [False, True])
def test_an_image_with_five_captions_in_five_rows_is_one_image(lone_group, perfect):
    """CLIP_benchmark's convention, counted one query at a time: of an image any of its captions is a hit."""
    stream, captions = five_rows_an_image()
    towers = {"image": Table(0, 7), "text": Table(1, 35)}
    if perfect:  # each caption is where its image is, the shared one at the first
        with torch.no_grad():
            for i in reversed(range(7)):
                towers["text"].rows[captions[i]] = towers["image"].rows[i]
    image, text = (towers[name].rows.detach() for name in ("image", "text"))
    known = sorted({c for own in captions for c in own})
    found = numbers(Retrieval(RetrievalConfig(k=(1, 5, 10))), context(towers, {"val": stream}))
    for k in (1, 5, 10):
        hits = 0
        for i in range(7):
            near = sorted(known, key=lambda c, i=i: -cosine(image[i], text[c]))[:k]
            hits += any(c in near for c in captions[i])
        assert found[f"retrieval/top{k}_text"].value == pytest.approx(hits / 7)
        assert found[f"retrieval/top{k}_text"].n == 7
    for k in (1, 5):
        hits = 0
        for c in known:
            near = sorted(range(7), key=lambda i, c=c: -cosine(image[i], text[c]))[:k]
            hits += any(c in captions[i] for i in near)
        assert found[f"retrieval/top{k}_image"].value == pytest.approx(hits / len(known))
        assert found[f"retrieval/top{k}_image"].n == len(known) == 33
    if perfect:
        assert found["retrieval/top1_text"].value >= 6 / 7 and found["retrieval/top1_image"].value == 1.0


class AllCaptions(ListStream):
    """Samples with all their captions, by number, in the order given; after the last one padding."""

    def __init__(self, captions: list[list[int]], rank: int = 0, world: int = 1, batch: int = 5) -> None:
        image = torch.arange(len(captions), dtype=torch.uint8).view(-1, 1, 1, 1)
        super().__init__(image, torch.zeros(len(captions), dtype=torch.int64), rank, world, batch)
        most = max(map(len, captions)) + 1
        self.texts = torch.zeros(len(captions), most, 2, dtype=torch.int64)
        self.mask = torch.zeros(len(captions), most, dtype=torch.bool)
        for i, own in enumerate(captions):
            self.texts[i, : len(own)] = torch.tensor([[c, 90 + i] for c in own])  # after its length nothing counts
            self.mask[i, : len(own)] = True

    def __iter__(self):
        for b in super().__iter__():
            more = {"texts": self.texts[b["id"]], "texts_length": self.mask[b["id"]].long()}
            yield b | more | {"texts_mask": self.mask[b["id"]]}


def at(degrees: list[float]) -> Table:
    table = Table(0, len(degrees))
    angle = torch.tensor(degrees).deg2rad()
    table.rows = nn.Parameter(torch.stack([angle.cos(), angle.sin()], dim=1))
    return table


def test_all_captions_of_an_image_count(lone_group):
    """On a circle, in degrees: images at 0, 100 and 201; the caption at 10 is that of two images."""
    towers = {"image": at([0, 100, 201]), "text": at([10, 190, 95, 210, 20])}
    stream = AllCaptions([[1, 0], [3, 2, 0], [4]])
    found = numbers(Retrieval(RetrievalConfig(k=(1, 2, 4, 5), field="texts")), context(towers, {"val": stream}))
    # Nearer than the nearest caption of its own are: to 0 none (10), to 100 none (95), to 201 all four others (20).
    # Nearer than the nearest image of its own are: to 10 none; to 190 two (201, 100); to 95 none; to 210 one (201);
    # to 20 two (0, 100).
    expected = {"top1_text": 2 / 3, "top2_text": 2 / 3, "top4_text": 2 / 3, "top1_image": 2 / 5, "top2_image": 3 / 5}
    assert {name: r.value for name, r in found.items()} == pytest.approx(
        {f"retrieval/{name}": value for name, value in expected.items()}
    )
    assert [found["retrieval/top1_text"].n, found["retrieval/top1_image"].n] == [3, 5]


def test_what_each_query_adds_and_which_image_it_is_of(lone_group):
    """Of the circle above, query by query, in the order of the stream; captions of an image are not independent."""
    towers = {"image": at([0, 100, 201]), "text": at([10, 190, 95, 210, 20])}
    stream = AllCaptions([[1, 0], [3, 2, 0], [4]])
    found = numbers(Retrieval(RetrievalConfig(k=(1,), field="texts")), context(towers, {"val": stream}))
    text, image = found["retrieval/top1_text"], found["retrieval/top1_image"]
    assert text.samples.tolist() == [True, True, False] and text.sources is None
    # Captions as they come: 190, 10 of the first image (10 also of the second), 210, 95 of the second, 20 of the third.
    assert image.samples.tolist() == [False, True, False, True, False]
    assert image.sources.tolist() == [0, 0, 1, 1, 2]
    assert text.stderr == pytest.approx((2 / 3 / 3 / 3) ** 0.5)
    rest = [(-0.4 + 0.6), (-0.4 + 0.6), -0.4]
    assert image.stderr == pytest.approx(sum(r * r for r in rest) ** 0.5 / 5)


def test_examples_show_what_was_found(lone_group, monkeypatch):
    """The words and images that figures are made of, on the circle."""
    drawn = {}
    monkeypatch.setattr(
        retrieval, "beside", lambda images, lines: drawn.setdefault("texts", (images, lines)) and PIXELS
    )
    monkeypatch.setattr(retrieval, "beneath", lambda *given: drawn.setdefault("images", given) and PIXELS)
    towers = {"image": at([0, 101, 201]), "text": at([10, 190, 95, 210, 20])}
    ctx = context(towers, {"val": AllCaptions([[1, 0], [3, 2, 0], [4]])})
    evaluation = Retrieval(RetrievalConfig(k=(1,), field="texts", examples=2))
    with torch.no_grad():
        figures = [o for o in evaluation.run(ctx) if isinstance(o, Figure)]
    assert [figure.name for figure in figures] == ["retrieval/texts", "retrieval/images"]
    images, lines = drawn["texts"]
    assert images.flatten().tolist() == [0, 1]  # pixels are numbers of images
    own = {True: verdict(True), False: verdict(False)}
    # To 0 the nearest captions are 10 (its own), 20 and 95; to 101 they are 95 (its own), 20 and 190.
    assert [[(line.text, line.colour) for line in row] for row in lines] == [
        [("text 0", own[True]), ("text 4", own[False]), ("text 2", own[False])],
        [("text 2", own[True]), ("text 4", own[False]), ("text 1", own[False])],
    ]
    titles, pictures, notes = drawn["images"]
    # The first captions are 190, nearest to 201, then 101, then 0, which is its own; and 10, nearest to 0, 101, 201.
    assert titles == ["text 1", "text 0"]
    assert [row.flatten().tolist() for row in pictures] == [[2, 1, 0], [0, 1, 2]]
    assert [[note.colour for note in row] for row in notes] == [
        [own[False], own[False], own[True]], [own[True], own[True], own[False]]
    ]  # fmt: skip
    with torch.no_grad():
        none = Retrieval(RetrievalConfig(k=(1,), field="texts", examples=0))
        assert not [o for o in none.run(ctx) if isinstance(o, Figure)]


PIXELS = np.zeros((2, 2, 3), np.uint8)


def test_captions_in_one_row_are_as_good_as_in_several(lone_group):
    """Those counted by hand above; here each image is one sample."""
    rows, captions = five_rows_an_image()
    found = []
    for stream, field in ((rows, "text"), (AllCaptions(captions, batch=3), "texts")):
        towers = {"image": Table(0, 7), "text": Table(1, 35)}
        evaluation = Retrieval(RetrievalConfig.model_validate({"field": field}))
        assert evaluation.uses().streams == {"val": ("image", field)}
        found.append(numbers(evaluation, context(towers, {"val": stream})))
    values = [{n: (r.value, r.n) for n, r in own.items()} for own in found]
    assert values[0] == values[1] and set(found[0]) == {
        "retrieval/top1_text", "retrieval/top5_text", "retrieval/top10_text", "retrieval/top1_image",
        "retrieval/top5_image",
    }  # fmt: skip


def on_a_rank() -> str:
    with process_group(1.0):
        return json.dumps(measured(dist.get_rank(), dist.get_world_size()))


def test_the_number_of_ranks_does_not_matter():
    first, *others = [e.value for world in (1, 3) for e in start_ranks(world, on_a_rank)]
    assert first and others == [first] * 3


def test_features_that_are_all_alike_find_nothing():
    same = torch.ones(4, 2)
    assert best_ranks(same, same, torch.arange(4).expand(2, 4)).tolist() == [3, 3, 3, 3]


def test_a_stream_without_texts_is_named(lone_group):
    class Silent(ListStream):
        def __iter__(self):
            return ({n: v for n, v in b.items() if not n.startswith("text")} for b in super().__iter__())

    plain = stream()
    silent = Silent(plain.image, plain.label)
    with pytest.raises(DataError, match='add "text"'):
        numbers(Retrieval(RetrievalConfig()), context(encoders(), {"val": silent}))
