"""Vector quantisation: the nearest of K learned codes at each place, or rounding of each channel.

Van den Oord et al., "Neural Discrete Representation Learning" (NeurIPS 2017, arXiv 1711.00937), eq. 3 and appendix A.1
(codes as moving averages); codes on the unit sphere: Yu et al. 2022 (2110.04627), section 3.2; dead codes started anew
from what the encoder gives: Dhariwal et al., "Jukebox" (2020, 2005.00341), section 3.1; finite scalar quantisation:
Mentzer et al. 2024 (2309.15505), section 3.1 and listing in appendix A.1.
Shape letters: B samples, Z channels of the code, h and w its height and width, N = Bhw, K codes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config.schema import Strict
from pipeline.dist.collectives import all_reduce
from pipeline.nn.generative.autoencoder import AutoencoderConfig

ROWS = 2**24
"""Distances that are computed at a time."""
SMOOTH = 1e-5
"""Added to the counts of codes, so that none is divided by nothing (the paper's code)."""


class CodesConfig(Strict):
    """What decides the codes of an image, once they have been learned."""

    network: AutoencoderConfig = AutoencoderConfig()
    quantiser: Literal["average", "gradient", "scalar"] = "average"
    """Codes are moving averages of what they stand for, or parameters; or each channel is rounded (FSQ)."""
    codes: Annotated[int, Field(ge=2)] = 512
    """K."""
    cosine: bool = False
    """Codes and what they stand for have length one."""
    levels: tuple[Annotated[int, Field(ge=2)], ...] = ()
    """Of each channel, for "scalar", in place of codes: as many as network.latent; (8, 5, 5, 5) are 1,000 codes."""

    @model_validator(mode="after")
    def _levels_fit(self) -> CodesConfig:
        scalar = self.quantiser == "scalar"
        if scalar != bool(self.levels):
            raise ValueError('"levels" are for quantiser = "scalar", which needs them; set both or neither')
        if scalar and len(self.levels) != self.network.latent:
            raise ValueError(f"{len(self.levels)} levels for network.latent = {self.network.latent}; give one for each")
        if scalar and self.cosine:
            raise ValueError('"cosine" is of codes that are learned; leave it out where quantiser = "scalar"')
        return self


class Quantised(NamedTuple):
    """Codes of a batch."""

    z: Tensor
    """[B,Z,h,w], with the encoder's gradient passed straight through."""
    index: Tensor
    """int64[B,h,w], numbers of the codes."""
    losses: Tensor
    """What codes and encoder pay for their distance, [B]."""


class Codebook(nn.Module):
    """K codes of Z numbers, moved by their gradient or as moving averages of what they stand for.

    Args:
        codes: K.
        width: Z.
        commitment: weight of the encoder's distance to its codes.
        decay: of the moving averages; None: codes are parameters.
        cosine: codes and what they stand for have length one.
        revive: codes that stand for fewer places than this, of those of a step, on average, are started anew.
    """

    weight: Tensor
    """[K,Z]."""
    sums: Tensor
    """[K,Z], of what codes stand for; where they are moving averages."""
    counts: Tensor
    """[K], places of a step that each code stands for, on average."""

    def __init__(
        self, codes: int, width: int, *, commitment: float, decay: float | None, cosine: bool, revive: float
    ) -> None:
        super().__init__()
        self.commitment, self.decay, self.cosine, self.revive = commitment, decay, cosine, revive
        # Close to zero, as in VQGAN's code, so that the side on which an output lies decides, and many codes are used.
        start = functional.normalize(torch.randn(codes, width), dim=1) if cosine else torch.empty(codes, width)
        if not cosine:
            nn.init.uniform_(start, -1 / codes, 1 / codes)
        if decay is None:
            self.weight = nn.Parameter(start)
        else:
            self.register_buffer("weight", start)
            self.register_buffer("sums", start.clone())
        self.register_buffer("counts", torch.ones(codes))
        self._fresh: list[tuple[Tensor, Tensor]] = []

    @property
    def codes(self) -> int:
        """K."""
        return len(self.counts)

    def table(self) -> Tensor:
        """The codes as they are looked up, float32[K,Z]."""
        weight = self.weight.float()
        return functional.normalize(weight, dim=1) if self.cosine else weight

    @torch.no_grad()
    def nearest(self, rows: Tensor, table: Tensor) -> Tensor:
        """Numbers of the nearest codes, the first of several: float32[N,Z] to int64[N]."""
        half = table.square().sum(dim=1) / 2
        step = max(1, ROWS // len(table))
        return torch.cat([(half - part @ table.T).argmin(dim=1) for part in rows.split(step)])

    def forward(self, x: Tensor) -> Quantised:
        """float[B,Z,h,w], in fp32 whatever surrounds it."""
        with torch.autocast(x.device.type, enabled=False):
            x = functional.normalize(x.float(), dim=1) if self.cosine else x.float()
            table, rows = self.table(), x.movedim(1, -1)
            index = self.nearest(rows.reshape(-1, rows.shape[-1]), table).view(rows.shape[:-1])
            found = functional.embedding(index, table).movedim(-1, 1)
            losses = self.commitment * (x - found.detach()).square().flatten(1).mean(dim=1)
            if self.decay is None:
                losses = losses + (x.detach() - found).square().flatten(1).mean(dim=1)
            return Quantised(x + (found - x).detach(), index, losses)

    def lookup(self, index: Tensor) -> Tensor:
        """int64[B,h,w] to float32[B,Z,h,w]."""
        return functional.embedding(index, self.table()).movedim(-1, 1)

    @torch.no_grad()
    def note(self, x: Tensor, index: Tensor) -> None:
        """Count what the codes of a micro-batch stand for; see :meth:`learn`."""
        rows = (functional.normalize(x.float(), dim=1) if self.cosine else x.float()).movedim(1, -1)
        counts = torch.bincount(index.flatten(), minlength=self.codes).to(self.counts)
        sums = rows.new_zeros(self.codes, rows.shape[-1])
        if self.decay is not None:
            sums.index_add_(0, index.flatten(), rows.reshape(-1, rows.shape[-1]))
        self._fresh.append((counts, sums))

    @torch.no_grad()
    def learn(self, candidates: Tensor, decay: float) -> None:
        """Once per update: move averages by what all ranks have noted, and start dead codes anew.

        Args:
            candidates: what may take the place of dead codes, float32[n,Z], in the same order on all ranks.
            decay: of the counts, where codes are parameters.
        """
        counts, sums = (torch.stack(parts).sum(dim=0) for parts in zip(*self._fresh, strict=True))
        self._fresh = []
        counts, kept = all_reduce(counts), decay if self.decay is None else self.decay
        self.counts.mul_(kept).add_(counts, alpha=1 - kept)
        if self.decay is None:
            return
        self.sums.mul_(kept).add_(all_reduce(sums).to(self.sums), alpha=1 - kept)
        total = self.counts.sum()
        smooth = (self.counts + SMOOTH) / (total + self.codes * SMOOTH) * total
        self.weight.copy_(self.sums / smooth[:, None])
        dead = (self.counts < self.revive).nonzero()[: len(candidates), 0]
        fresh = candidates[: len(dead)].to(self.weight)
        self.weight[dead] = functional.normalize(fresh, dim=1) if self.cosine else fresh
        self.counts[dead] = self.revive
        self.sums[dead] = self.weight[dead] * self.revive


class Scalars(nn.Module):
    """Finite scalar quantisation: each channel is bounded and rounded to one of a few levels. Nothing is learned.

    Args:
        levels: of each channel; K is their product.
    """

    counts: Tensor

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        self.levels = tuple(levels)
        self.register_buffer("counts", torch.ones(math.prod(levels)))
        self._fresh: list[Tensor] = []

    @property
    def codes(self) -> int:
        """K."""
        return len(self.counts)

    def _per_channel(self, values: Sequence[float], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=like.device).view(-1, 1, 1)

    def forward(self, x: Tensor) -> Quantised:
        """float[B,Z,h,w]; codes lie from -1 to 1."""
        x = x.float()
        half = self._per_channel([(n - 1) * (1 + 1e-3) / 2 for n in self.levels], x)
        offset = self._per_channel([0.5 if n % 2 == 0 else 0.0 for n in self.levels], x)
        bounded = torch.tanh(x + torch.atanh(offset / half)) * half - offset
        width = self._per_channel([n // 2 for n in self.levels], x)
        whole = bounded + (bounded.round() - bounded).detach()
        digits = (whole.detach() + width).long()
        place = self._per_channel([math.prod(self.levels[:i]) for i in range(len(self.levels))], x).long()
        return Quantised(whole / width, (digits * place).sum(dim=1), x.new_zeros(len(x)))

    def lookup(self, index: Tensor) -> Tensor:
        """int64[B,h,w] to float32[B,Z,h,w]."""
        digits, left = [], index
        for n in self.levels:
            digits.append((left % n - n // 2).float() / (n // 2))
            left = left // n
        return torch.stack(digits, dim=1)

    @torch.no_grad()
    def note(self, x: Tensor, index: Tensor) -> None:
        """Count the codes of a micro-batch."""
        self._fresh.append(torch.bincount(index.flatten(), minlength=self.codes).to(self.counts))

    @torch.no_grad()
    def learn(self, candidates: Tensor, decay: float) -> None:
        """Once per update: move the counts by those of all ranks."""
        self.counts.mul_(decay).add_(all_reduce(torch.stack(self._fresh).sum(dim=0)), alpha=1 - decay)
        self._fresh = []


def perplexity(counts: Tensor) -> Tensor:
    """How many codes are used as if all of those were used alike: exp of the entropy of counts [K], []."""
    share = counts.double() / counts.double().sum()
    return torch.exp(-torch.special.xlogy(share, share).sum()).to(counts)
