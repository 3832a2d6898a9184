"""Pictures of feature space: PCA and t-SNE of the same samples, coloured by class and by where they come from.

t-SNE: van der Maaten and Hinton, "Visualizing Data using t-SNE" (JMLR 2008), scikit-learn's, begun from the principal
components as Kobak and Berens advise ("The art of using t-SNE for single-cell transcriptomics", Nature Communications
2019), so that chance has little to decide. How much a picture may be believed: trustworthiness (Venna and Kaski 2001).
The folder of the evaluation holds what TensorBoard's projector takes: `tensorboard --logdir FOLDER`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import Field, model_validator
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE, trustworthiness
from torch.nn import functional

from pipeline.config.schema import Strict
from pipeline.core.errors import DataError
from pipeline.core.evaluation import EvalContext, Evaluation, Figure, Number, Output, Uses
from pipeline.core.files import replace_file
from pipeline.dist.group import by_first
from pipeline.evals._figures import cloud

VECTORS, METADATA, PROJECTOR = "vectors.tsv", "metadata.tsv", "projector_config.pbtxt"
NEIGHBOURS = 5
"""Of the trustworthiness."""


class Config(Strict):
    """Settings of the maps."""

    test: str = "val"
    """Stream whose samples are shown."""
    beside: tuple[str, ...] = ()
    """Streams that are shown with it, each as a domain of its own."""
    samples: Annotated[int, Field(ge=20)] = 2000
    """At most so many of each stream, spread evenly over it."""
    maps: Annotated[tuple[Literal["pca", "tsne"], ...], Field(min_length=1)] = ("pca", "tsne")
    perplexity: Annotated[float, Field(gt=0)] = 30.0
    """Of t-SNE: about as many neighbours count; fewer where there are fewer than three times as many samples."""
    seed: int = 0

    @model_validator(mode="after")
    def _apart(self) -> Config:
        if len({self.test, *self.beside}) < 1 + len(self.beside):
            raise ValueError("a stream is named twice among 'test' and 'beside'")
        return self


class Shown(NamedTuple):
    """What is shown of all streams."""

    x: np.ndarray
    """float64[N,D], unit vectors."""
    kind: np.ndarray
    """int64[N], a number into ``names``."""
    names: list[str]
    """Of classes; the same class of two streams is one."""
    domain: np.ndarray
    """int64[N], the number of the stream."""
    sample: np.ndarray
    """int64[N], the sample in its stream."""


class EmbeddingMap(Evaluation):
    """Reports figures "embedding_map/tsne_classes" and, with several streams, "embedding_map/tsne_domains", those of
    PCA, the trustworthiness of each map, and "embedding_map/pca_variance", the part of all variance in PCA's plane.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def uses(self) -> Uses:
        """The streams that are shown."""
        return Uses({name: ("image", "label") for name in (self.config.test, *self.config.beside)})

    def run(self, ctx: EvalContext) -> Iterator[Output]:
        """Extract on all ranks, draw on the first, tell all.

        Raises:
            DataError: fewer than ten samples.
        """
        shown = self._shown(ctx)
        if len(shown.x) < 2 * NEIGHBOURS:
            raise DataError(f"stream {self.config.test!r} has {len(shown.x)} samples; a map needs {2 * NEIGHBOURS}")
        yield from by_first(lambda: self._drawn(shown, ctx.folder))

    def _shown(self, ctx: EvalContext) -> Shown:
        streams = (self.config.test, *self.config.beside)
        found = [ctx.features("image", name) for name in streams]
        places = [np.unique(np.linspace(0, len(f.x) - 1, min(self.config.samples, len(f.x))).round()) for f in found]
        names = list(dict.fromkeys(name for f in found for name in f.classes))
        number = {name: i for i, name in enumerate(names)}
        rows = [place.astype(np.int64) for place in places]
        x = [functional.normalize(f.x.double()).numpy()[row] for f, row in zip(found, rows, strict=True)]
        kinds = [
            np.array([number[name] for name in f.classes], np.int64)[f.label.numpy()[row]]
            for f, row in zip(found, rows, strict=True)
        ]
        domain = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
        return Shown(np.concatenate(x), np.concatenate(kinds), names, domain, np.concatenate(rows))

    def _drawn(self, shown: Shown, folder: Path) -> list[Output]:
        """All that is reported; the projector's files are written on the way."""
        split, n = self.config.test, len(shown.x)
        streams = (split, *self.config.beside)
        outputs = list[Output]()
        for way in self.config.maps:
            if way == "pca":
                model = PCA(2, svd_solver="full").fit(shown.x)
                place, title = model.transform(shown.x), "Principal components"
                part = float(model.explained_variance_ratio_.sum())
                outputs.append(Number("embedding_map/pca_variance", part, n, split, better=None))
            else:
                perplexity = min(self.config.perplexity, (n - 1) / 3)
                place = TSNE(perplexity=perplexity, init="pca", random_state=self.config.seed).fit_transform(shown.x)
                title = f"t-SNE (perplexity {perplexity:g})"
            trust = float(trustworthiness(shown.x, place, n_neighbors=NEIGHBOURS))
            outputs.append(Number(f"embedding_map/{way}_trustworthiness", trust, n, split))
            caption = f"{title} of {n:,} samples of {', '.join(streams)}; trustworthiness {trust:.2f}. Coloured by"
            image = cloud(place, shown.kind, shown.names)
            outputs.append(Figure(f"embedding_map/{way}_classes", image, f"{caption} class", split))
            if len(streams) > 1:
                image = cloud(place, shown.domain, streams)
                outputs.append(Figure(f"embedding_map/{way}_domains", image, f"{caption} stream", split))
        _for_projector(folder, shown, streams)
        return outputs


def _for_projector(folder: Path, shown: Shown, streams: Sequence[str]) -> None:
    """Vectors, what is known of them, and where TensorBoard finds both."""
    vectors = io.StringIO()
    np.savetxt(vectors, shown.x, fmt="%.6g", delimiter="\t")
    lines = ["class\tstream\tsample"]
    for kind, domain, sample in zip(shown.kind, shown.domain, shown.sample, strict=True):
        lines.append("\t".join(re.sub(r"\s+", " ", str(v)) for v in (shown.names[kind], streams[domain], sample)))
    config = f'embeddings {{\n  tensor_path: "{VECTORS}"\n  metadata_path: "{METADATA}"\n}}\n'
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in ((VECTORS, vectors.getvalue()), (METADATA, "\n".join(lines) + "\n"), (PROJECTOR, config)):
        replace_file(folder / name, text.encode())
