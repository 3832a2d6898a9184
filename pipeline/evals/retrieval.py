"""Retrieval: for each image its caption among all captions, and for each caption its image among all images.

The protocol of CLIP's and CLIP_benchmark's retrieval: cosine similarity, and a hit at k when at least one that belongs
is among the k nearest. Samples with the same caption all belong to it, and each caption counts once.
Shape letters: N images, M different captions, E width.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config.schema import Strict
from pipeline.core.errors import DataError
from pipeline.core.protocols import EvalStream, Evaluation, Result
from pipeline.dist.gather import gather_ragged
from pipeline.dist.group import gather_rows
from pipeline.evals._features import named_stream

QUERIES = 1024
"""Queries compared at once."""


class Config(Strict):
    """Settings of retrieval."""

    test: str = "val"
    """Stream of images and captions."""
    k: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (1, 5, 10)
    """Of each, what is no smaller than the number of candidates is left out."""


class Retrieval(Evaluation):
    """Reports "retrieval/top1_text" (texts found for images), "retrieval/top1_image" (images for texts), for each k."""

    needs = ("image", "text")

    def __init__(self, config: Config) -> None:
        self.config = config

    def run(self, encoders: Mapping[str, nn.Module], streams: Mapping[str, EvalStream]) -> Iterator[Result]:
        """Encode both sides on all ranks, compare on each.

        Raises:
            DataError: the stream has no texts, or the ranks' shares do not make it up.
        """
        stream = named_stream(streams, self.config.test, "retrieval.test")
        image, text, caption = _pairs(encoders, stream)
        known, of_image = caption.unique(dim=0, return_inverse=True)
        # The first sample of each caption stands for it.
        first = torch.full((len(known),), len(of_image)).scatter_reduce(
            0, of_image, torch.arange(len(of_image)), "amin"
        )
        texts = text[first]
        directions = (
            ("text", image, texts, of_image, torch.arange(len(known))),
            ("image", texts, image, torch.arange(len(known)), of_image),
        )
        for name, queries, candidates, own, theirs in directions:
            ranks = best_ranks(queries, candidates, own, theirs)
            for k in (k for k in self.config.k if k < len(candidates)):
                p, n = float((ranks < k).double().mean()), len(queries)
                yield Result(f"retrieval/top{k}_{name}", p, n, self.config.test, math.sqrt(p * (1 - p) / n))


def best_ranks(queries: Tensor, candidates: Tensor, own: Tensor, theirs: Tensor) -> Tensor:
    """How many candidates that do not belong are nearer than the nearest one that does, int64 per query.

    Args:
        queries: unit vectors [Q,E].
        candidates: unit vectors [C,E].
        own: int64[Q], group of each query.
        theirs: int64[C], group of each candidate; a query belongs to those of its group.
    """
    ranks = []
    for first in range(0, len(queries), QUERIES):
        cosine = queries[first : first + QUERIES] @ candidates.T
        belongs = own[first : first + QUERIES, None] == theirs
        best = cosine.masked_fill(~belongs, -math.inf).amax(dim=1, keepdim=True)
        # An equal one that does not belong counts against: features that are all alike find nothing.
        ranks.append(((cosine >= best) & ~belongs).sum(dim=1))
    return torch.cat(ranks)


def _pairs(encoders: Mapping[str, nn.Module], stream: EvalStream) -> tuple[Tensor, Tensor, Tensor]:
    """Unit vectors of images and texts, float32[N,E] each, and the texts' tokens, int64[N,L], in the stream's order."""
    device = next(encoders["image"].parameters()).device
    parts: list[tuple[Tensor, ...]] = []
    for batch in stream:
        if "text" not in batch:
            raise DataError('this evaluation needs texts; add "text" to the suite\'s fields')
        moved = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        image, text = encoders["image"](moved["image"]), encoders["text"](moved["text"], moved["text_length"])
        inside = torch.arange(batch["text"].shape[1]) < batch["text_length"][:, None]
        tokens = batch["text"].where(inside, -1)
        parts.append((*(functional.normalize(x.float(), dim=1).cpu() for x in (image, text)), tokens, batch["id"]))
    # A rank without samples learns the widths from the others.
    own = [x.shape[1] for x in parts[0][:3]] if parts else [0, 0, 0]
    widths = gather_rows(torch.tensor(own)).amax(dim=0).tolist()
    empty = (
        *(torch.empty(0, w) for w in widths[:2]),
        torch.empty(0, widths[2], dtype=torch.int64),
        torch.empty(0).long(),
    )
    image, text, tokens, ids = (gather_ragged(torch.cat(column)) for column in zip(empty, *parts, strict=True))
    order = ids.argsort()
    if not torch.equal(ids[order], torch.arange(stream.samples)):
        raise DataError(f"the ranks' shares hold {len(ids)} samples, not each of {stream.samples} once")
    return image[order], text[order], tokens[order]
