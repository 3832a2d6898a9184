"""Retrieval: for each image its caption among all captions, and for each caption its image among all images.

The protocol of CLIP's and CLIP_benchmark's retrieval: cosine similarity, and a hit at k when at least one that belongs
is among the k nearest. Samples with equal images are one image with several captions, those with equal captions one
caption of several images; each image and each caption is one query and one candidate. With ``field = "texts"`` a
sample brings all its captions.
Shape letters: S captions of all samples, L tokens, U different images, M different captions, P pairs, E width, Q
queries.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from pipeline.config.schema import Strict
from pipeline.core.evaluation import EvalContext, Evaluation, Figure, Number, Output, Uses
from pipeline.core.protocols import Batch
from pipeline.dist.gather import gather_ragged
from pipeline.evals._pictures import images_of
from pipeline.nn.pictures import Line, beneath, beside, verdict

QUERIES = 1024
"""Queries compared at once."""
TEXTS = 256
"""Captions encoded at once."""
FOUND = 3
"""Of each query that is shown, what is nearest."""


class Config(Strict):
    """Settings of retrieval."""

    test: str = "val"
    """Stream of images and captions."""
    k: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (1, 5, 10)
    """Of each, what is no smaller than the number of candidates is left out."""
    field: Literal["text", "texts"] = "text"
    """Of the stream's batches: one caption of each sample, or all of them."""
    examples: Annotated[int, Field(ge=0)] = 6
    """Queries of each kind that are shown with what they find; for their images the stream is read again. 0: none."""


class Retrieval(Evaluation):
    """Reports "retrieval/top1_text" (texts found for images), "retrieval/top1_image" (images for texts), for each k.

    Queries are compared between models one by one, captions of an image together. The figures "retrieval/texts" and
    "retrieval/images" show what the first queries find.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def uses(self) -> Uses:
        """Both towers, on images with captions."""
        return Uses({self.config.test: ("image", self.config.field)}, ("image", "text"))

    def scores(self, classes: int) -> Mapping[str, tuple[float, float]]:
        """Where the captions are those of classes: the share of one."""
        return {f"retrieval/top1_{side}": (1 / classes, 1.0) for side in ("text", "image")}

    def run(self, ctx: EvalContext) -> Iterator[Output]:
        """Encode both sides on all ranks, compare on each.

        Raises:
            DataError: the stream has no texts.
        """
        x, sample, image, token, length = self._read(ctx)
        inside = torch.arange(token.shape[1]) < length[:, None]
        caption, first_caption = _groups(token.where(inside, -1))
        images = functional.normalize(x, dim=1)
        texts = _encode(ctx, token[first_caption], length[first_caption])
        pairs = torch.stack([image, caption]).unique(dim=1)
        source = torch.full((len(texts),), len(images)).scatter_reduce(0, pairs[1], pairs[0], "amin").numpy()
        sides = (("text", images, texts, pairs, None), ("image", texts, images, pairs.flip(0), source))
        for name, queries, candidates, own, sources in sides:
            ranks = best_ranks(queries, candidates, own)
            for k in (k for k in self.config.k if k < len(candidates)):
                hits = (ranks < k).numpy()
                p, n = float(hits.mean()), len(hits)
                error = _error(hits, sources)
                yield Number(f"retrieval/top{k}_{name}", p, n, self.config.test, error, samples=hits, sources=sources)
        if self.config.examples:
            rows = {"text": token[first_caption], "text_length": length[first_caption]}
            yield from self._shown(ctx, images, texts, pairs, sample, rows)

    def _shown(
        self, ctx: EvalContext, images: Tensor, texts: Tensor, pairs: Tensor, sample: Tensor, rows: Batch
    ) -> Iterator[Figure]:
        """What the first images and captions find; ``sample`` is the first sample of each image."""
        count, split = self.config.examples, self.config.test
        found_texts = (images[:count] @ texts.T).topk(min(FOUND, len(texts)), dim=1).indices
        found_images = (texts[:count] @ images.T).topk(min(FOUND, len(images)), dim=1).indices
        asked = {*range(min(count, len(images))), *found_images.flatten().tolist()}
        seen = images_of(ctx, split, {int(sample[number]) for number in asked})
        belong = set(zip(*pairs.tolist(), strict=True))
        said = {n: ctx.words({key: value[n : n + 1] for key, value in rows.items()})[0] for n in
                {*found_texts.flatten().tolist(), *range(len(found_images))}}  # fmt: skip
        lines = [
            [Line(said[text], verdict((number, text) in belong)) for text in row]
            for number, row in enumerate(found_texts.tolist())
        ]
        queries = torch.stack([seen[int(sample[number])] for number in range(len(lines))])
        caption = "Images, and the captions nearest to each; green ones are its own"
        yield Figure("retrieval/texts", beside(queries, lines), caption, split)
        pictures = [torch.stack([seen[int(sample[number])] for number in row]) for row in found_images.tolist()]
        notes = [
            [
                Line("its image" if (number, text) in belong else "another", verdict((number, text) in belong))
                for number in row
            ]
            for text, row in enumerate(found_images.tolist())
        ]
        caption = "Captions, and the images nearest to each"
        yield Figure("retrieval/images", beneath([said[n] for n in range(len(notes))], pictures, notes), caption, split)

    def _read(self, ctx: EvalContext) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Features float32[U,E] of the images and their first samples, int64[U]; of each caption its image, int64[S],
        and tokens, int64[S,L] and [S].
        """
        name = self.config.field
        columns = [name, f"{name}_length", *(["texts_mask"] if name == "texts" else [])]
        found = ctx.features("image", self.config.test, (*columns, "image_digest"))
        token, length, *mask = (found.fields[column] for column in columns)
        image, first = _groups(found.fields["image_digest"])
        if mask:
            image, token, length = image[mask[0].nonzero()[:, 0]], token[mask[0]], length[mask[0]]
        return found.x[first], first, image, token, length


def best_ranks(queries: Tensor, candidates: Tensor, pairs: Tensor) -> Tensor:
    """How many candidates that do not belong are nearer than the nearest one that does, int64 per query.

    Args:
        queries: unit vectors [Q,E].
        candidates: unit vectors [C,E].
        pairs: int64[2,P], a query and a candidate that belongs to it; each query has one at least.
    """
    ranks = []
    for first in range(0, len(queries), QUERIES):
        cosine = queries[first : first + QUERIES] @ candidates.T
        row = pairs[0] - first
        here = (row >= 0) & (row < len(cosine))
        belongs = torch.zeros_like(cosine, dtype=torch.bool)
        belongs[row[here], pairs[1, here]] = True
        best = cosine.masked_fill(~belongs, -math.inf).amax(dim=1, keepdim=True)
        # An equal one that does not belong counts against: features that are all alike find nothing.
        ranks.append(((cosine >= best) & ~belongs).sum(dim=1))
    return torch.cat(ranks)


def _groups(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of N rows: the group of each, which are equal, int64[N]; and the first row of each group, ascending."""
    known, group = rows.unique(dim=0, return_inverse=True)
    first = torch.full((len(known),), len(group)).scatter_reduce(0, group, torch.arange(len(group)), "amin")
    order = first.argsort()
    return order.argsort()[group], first[order]


def _error(hits: np.ndarray, sources: np.ndarray | None) -> float:
    """Standard error of the mean of bool[Q]; of queries that share a source it is that of clusters."""
    rest = hits - hits.mean()
    sums = rest if sources is None else np.bincount(sources, rest)
    return math.sqrt(float((sums**2).sum())) / len(hits)


def _encode(ctx: EvalContext, token: Tensor, length: Tensor) -> Tensor:
    """Unit vectors float32[M,E] of M captions, the same on every rank; each encodes its share."""
    rank, world = ctx.place.rank, ctx.place.world_size
    first, last = rank * len(token) // world, (rank + 1) * len(token) // world
    mine = slice(first, max(last, first + 1))  # a rank without any learns the width from one that it does not send
    parts = []
    for some, sizes in zip(token[mine].split(TEXTS), length[mine].split(TEXTS), strict=True):
        z = ctx.encoders["text"](some.to(ctx.place.device), sizes.to(ctx.place.device))
        parts.append(functional.normalize(z.float(), dim=1).cpu())
    return gather_ragged(torch.cat(parts)[: last - first])
