"""Whether samples of no known class are told from the others: out-of-distribution detection, after the fact.

Each way gives every sample a number, larger for what is known; the measures are those of OpenOOD (Zhang et al. 2023,
arXiv 2306.09301): AUROC, and the share of unknown samples that pass where 95 % of the known ones do.

- "msp": the largest probability (Hendrycks and Gimpel 2017). "energy": log sum exp of the logits (Liu et al. 2020).
- "knn": minus the distance of unit vectors to the k-th nearest training sample (Sun et al. 2022).
- "mahalanobis": minus the smallest distance to a class mean under the covariance that classes share (Lee et al. 2018).

Of a model of images that knows how likely they are, bits per dimension:

- "likelihood": minus the bits. Models find simple images of another kind likelier than their own (Nalisnick et al.
  2019, "Do Deep Generative Models Know What They Don't Know?", arXiv 1810.09136): an AUROC below a half.
- "complexity": the bits of the image as PNG minus the model's (Serra et al. 2020, 1909.11480, eq. 2).
- "typicality": minus the distance from the mean bits of training images (Nalisnick et al. 2019, 1906.02994, of one
  image at a time).

Shape letters: N samples, D width, K classes.
"""

import io
import math
from collections.abc import Callable, Iterator
from typing import Annotated, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field, model_validator
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional

from pipeline.config.schema import Strict
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.evaluation import EvalContext, Evaluation, Features, Number, Uses
from pipeline.evals._bits import Measured, likely, measure
from pipeline.evals._samples import maker_of

Way = Literal["msp", "energy", "knn", "mahalanobis", "likelihood", "complexity", "typicality"]
OF_LOGITS: tuple[Way, ...] = ("msp", "energy")
OF_FEATURES: tuple[Way, ...] = ("knn", "mahalanobis")
OF_BITS: tuple[Way, ...] = ("likelihood", "complexity", "typicality")
PASSES = 0.95
"""Share of the known samples that is let through."""
QUERIES = 1024


class Config(Strict):
    """Settings of the detection of unknown samples."""

    train: str = "train"
    """Stream that distances are to; used by "knn", "mahalanobis" and "typicality" alone."""
    test: str = "val"
    """Stream of known classes."""
    unknown: Annotated[tuple[str, ...], Field(min_length=1)]
    """Streams of other data; each is reported."""
    ways: Annotated[tuple[Way, ...], Field(min_length=1)] = ("knn", "mahalanobis")
    k: Annotated[int, Field(ge=1)] = 50
    """Of "knn"."""
    steps: Annotated[int, Field(ge=2)] | None = None
    """Of likelihoods; see the evaluation of that name."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of likelihoods."""

    @model_validator(mode="after")
    def _apart(self) -> "Config":
        if {self.train, self.test} & set(self.unknown):
            raise ValueError("a stream of known classes cannot be 'unknown' too")
        return self


class OOD(Evaluation):
    """Reports "ood/auroc_WAY_STREAM" and "ood/fpr95_WAY_STREAM"; by bits also "ood/bits_per_dim_KIND_STREAM" itself."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def uses(self) -> Uses:
        """The streams, and of the encoders those that the ways need; labels where classes have means."""
        ways = set(self.config.ways)
        distances, bits = ways & set(OF_FEATURES), ways & set(OF_BITS)
        streams: dict[str, tuple[str, ...]] = dict.fromkeys((self.config.test, *self.config.unknown), ("image",))
        if distances:
            labelled = ("image", "label") if "mahalanobis" in distances else ("image",)
            streams[self.config.train] = labelled
        elif "typicality" in bits:
            streams[self.config.train] = ("image",)
        encoders = ("image",) * bool(distances) + ("logits",) * bool(ways & set(OF_LOGITS))
        return Uses(streams, encoders + ("generator",) * bool(bits))

    def check(self, ctx: EvalContext) -> None:
        """No farther neighbour than there are, other data than the known, and a model that knows any image's bits."""
        if set(self.config.ways) & set(OF_BITS):
            likely(ctx).check_likelihood(self.config.steps)
            if told := maker_of(ctx).told:
                raise ConfigError(
                    f'ood.ways: the model is told the "{told}" of an image, which an unknown one has not; train one '
                    "without conditions, or leave out " + ", ".join(OF_BITS)
                )
        if "knn" in self.config.ways and self.config.k > ctx.streams[self.config.train].samples:
            raise ConfigError(f"ood.k: stream {self.config.train!r} has no {self.config.k} samples; set fewer")
        for name in self.config.unknown:
            if ctx.streams[name].fingerprint == ctx.streams[self.config.test].fingerprint:
                raise ConfigError(f"ood.unknown: stream {name!r} is the same data as {self.config.test!r}")

    def run(self, ctx: EvalContext) -> Iterator[Number]:
        """Extract on all ranks, and measure what all know."""
        bits = ModelBits(self.config, ctx)
        for way in self.config.ways:
            score = bits.scorer(way) if way in OF_BITS else self._scorer(way, ctx)
            known = score(self.config.test).numpy()
            for name in self.config.unknown:
                unknown = score(name).numpy()
                auroc, passes = separation(known, unknown)
                share, n, split = float(passes.mean()), len(unknown), self.config.test
                error = math.sqrt(share * (1 - share) / n)
                yield Number(f"ood/auroc_{way}_{name}", auroc, len(known) + n, split)
                yield Number(f"ood/fpr95_{way}_{name}", share, n, split, error, better="lower", samples=passes)
        yield from bits.numbers()

    def _scorer(self, way: Way, ctx: EvalContext) -> Callable[[str], Tensor]:
        """What gives each sample of a stream its number, float64[N]."""
        if way in OF_LOGITS:
            of = (lambda x: x.softmax(dim=1).amax(dim=1)) if way == "msp" else (lambda x: x.logsumexp(dim=1))
            return lambda stream: of(ctx.features("logits", stream, fields=()).x.double())
        fields = ("label",) if way == "mahalanobis" else ()
        train = ctx.features("image", self.config.train, fields=fields)
        near = Gaussians(train) if way == "mahalanobis" else Neighbours(train, self.config.k)
        return lambda stream: near(ctx.features("image", stream, fields=()).x)


class ModelBits:
    """How many bits images take, each stream measured once."""

    def __init__(self, config: Config, ctx: EvalContext) -> None:
        self.config, self.ctx = config, ctx
        self._found: dict[str, Measured] = {}

    def of(self, stream: str) -> Measured:
        """Of a stream, with the bits of each image as PNG beside them."""
        if stream not in self._found:
            own = self.config
            self._found[stream] = measure(self.ctx, stream, png_bits, seed=own.seed, steps=own.steps)
        return self._found[stream]

    def scorer(self, way: Way) -> Callable[[str], Tensor]:
        """What gives each sample of a stream its number, float64[N]."""
        if way == "typicality":
            usual = self.of(self.config.train).bits[:, 0].mean()
            return lambda stream: -(self.of(stream).bits[:, 0] - usual).abs()
        if way == "complexity":
            return lambda stream: self.of(stream).beside - self.of(stream).bits[:, 0]
        return lambda stream: -self.of(stream).bits[:, 0]

    def numbers(self) -> Iterator[Number]:
        """The mean of each stream."""
        for stream, found in self._found.items():
            bits = found.bits[:, 0]
            error = float(bits.std(correction=0)) / math.sqrt(len(bits))
            kept = bits.float().numpy()
            yield Number(f"ood/{found.names[0]}_{stream}", float(bits.mean()), len(bits), stream, error, None, kept)


def png_bits(image: Tensor) -> Tensor:
    """Bits per dimension of images as PNG files, as small as they get: uint8[B,C,H,W] to float64[B]."""
    sizes = []
    for pixels in image.permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(file, "PNG", optimize=True)
        sizes.append(8 * file.tell() / pixels.size)
    return torch.tensor(sizes, dtype=torch.float64)


class Neighbours:
    """Minus the distance of unit vectors to the k-th nearest of the training samples."""

    def __init__(self, train: Features, k: int) -> None:
        self.bank, self.k = functional.normalize(train.x.double()), k

    def __call__(self, x: Tensor) -> Tensor:
        """[N,D] to float64[N]."""
        parts = functional.normalize(x.double()).split(QUERIES)
        return torch.cat([-torch.cdist(part, self.bank).kthvalue(self.k, dim=1).values for part in parts])


class Gaussians:
    """Minus the smallest squared Mahalanobis distance to a class mean."""

    def __init__(self, train: Features) -> None:
        x, label = train.x.double(), train.label
        known = label.unique()
        self.means = torch.stack([x[label == number].mean(dim=0) for number in known])
        rest = x - self.means[torch.searchsorted(known, label)]
        if len(x) <= len(known):
            raise DataError(f"{len(x)} samples of {len(known)} classes have no covariance; measure with more samples")
        # Features that never vary have no inverse: a hundred-thousandth of the mean variance is added to all.
        covariance = rest.T @ rest / len(x)
        floor = 1e-5 * covariance.diagonal().mean().clamp_min(1e-12)
        self.root = torch.linalg.cholesky(covariance + floor * torch.eye(len(covariance), dtype=covariance.dtype))
        self.white_means = torch.linalg.solve_triangular(self.root, self.means.T, upper=False).T

    def __call__(self, x: Tensor) -> Tensor:
        """[N,D] to float64[N]."""
        white = torch.linalg.solve_triangular(self.root, x.double().T, upper=False).T
        return torch.cat([-torch.cdist(part, self.white_means).amin(dim=1).square() for part in white.split(QUERIES)])


def separation(known: np.ndarray, unknown: np.ndarray) -> tuple[float, np.ndarray]:
    """AUROC, and which of the unknown samples score at least what 95 % of the known ones reach, bool[M].

    Args:
        known: float64[N], larger for what looks known.
        unknown: float64[M].
    """
    truth = np.concatenate([np.ones(len(known)), np.zeros(len(unknown))])
    auroc = float(roc_auc_score(truth, np.concatenate([known, unknown])))
    let_through = math.ceil(PASSES * len(known))
    threshold = np.sort(known)[::-1][let_through - 1]
    return auroc, unknown >= threshold
