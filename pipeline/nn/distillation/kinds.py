"""The kinds of losses that a distillation may sum, each with its settings.

Shape letters: B samples, D width of the student, E of the teacher, K classes.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from pipeline.config.strict import Positive, PositiveFloat, Text
from pipeline.nn.distillation import contrast, feature, relation, response
from pipeline.nn.weighted import Weight, Weighted

RELATIONS = {
    "distances": relation.distances,
    "angles": relation.angles,
    "similarities": relation.similarities,
    "neighbours": relation.neighbours,
}


class Loss(Weighted):
    """What all kinds have."""

    reads: ClassVar[Literal["labels", "logits", "pooled", "map", "any"]]
    """What of both models: "labels" asks no teacher; "any" is pooled features, or a map where a block is named."""
    compares: ClassVar[bool] = False
    """The samples of the global batch with each other."""
    labelled: ClassVar[bool] = False
    """Whether the data's labels are used."""

    teacher: str = ""
    """Left out: the only one."""

    def connectors(self, student: int, teacher: int) -> dict[str, nn.Module]:
        """Layers on features of these widths, trained beside the student: "student", "teacher"."""
        return {}

    def losses(self, student: Tensor, teacher: Tensor | None, label: Tensor | None) -> Tensor:
        """float[B]."""
        raise NotImplementedError


class OfTeacher(Loss):
    """Kinds on what the teacher gives."""

    def losses(self, student: Tensor, teacher: Tensor | None, label: Tensor | None) -> Tensor:
        """float[B]."""
        assert teacher is not None
        return self._of(student, teacher, label)

    def _of(self, student: Tensor, teacher: Tensor, label: Tensor | None) -> Tensor:
        raise NotImplementedError


class OfBlock(OfTeacher):
    """Kinds on features."""

    block: Text | None = None
    """Name of a block of the student; left out: its pooled features."""
    teacher_block: Text | None = None
    """Left out: as ``block``."""

    @property
    def blocks(self) -> tuple[str, str] | None:
        """Student's and teacher's; None: pooled features."""
        if self.block is None:
            return None
        return self.block, self.teacher_block or self.block


class Labels(Loss):
    """Cross-entropy with the data's labels."""

    kind: Literal["labels"]
    reads = "labels"
    labelled = True
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def losses(self, student: Tensor, teacher: Tensor | None, label: Tensor | None) -> Tensor:
        """float[B]."""
        assert label is not None
        return response.labels(student, label, self.label_smoothing)


class Hard(OfTeacher):
    """Cross-entropy with what the teacher decides."""

    kind: Literal["hard"]
    reads = "logits"

    def _of(self, student: Tensor, teacher: Tensor, label: Tensor | None) -> Tensor:
        return response.hard(student, teacher)


class KL(OfTeacher):
    """KL of softened answers."""

    kind: Literal["kl"]
    reads = "logits"
    temperature: PositiveFloat = 4.0

    def _of(self, student: Tensor, teacher: Tensor, label: Tensor | None) -> Tensor:
        return response.soft_targets(student, teacher, self.temperature)


class DKD(OfTeacher):
    """Decoupled: the target class, and the others among themselves."""

    kind: Literal["dkd"]
    reads = "logits"
    labelled = True
    alpha: Weight = 1.0
    beta: Weight = 8.0
    temperature: PositiveFloat = 4.0

    def _of(self, student: Tensor, teacher: Tensor, label: Tensor | None) -> Tensor:
        assert label is not None
        return response.decoupled(student, teacher, label, self.alpha, self.beta, self.temperature)


class DIST(OfTeacher):
    """Correlations between and within classes."""

    kind: Literal["dist"]
    reads = "logits"
    compares = True
    beta: Weight = 1.0
    gamma: Weight = 1.0
    temperature: PositiveFloat = 1.0

    def _of(self, student: Tensor, teacher: Tensor, label: Tensor | None) -> Tensor:
        return response.correlation(student, teacher, self.beta, self.gamma, self.temperature)


class Connected(OfBlock):
    """Behind a linear layer from the student's width to the teacher's."""

    connector: bool = True
    """False: none, for features of one width."""

    def connectors(self, student: int, teacher: int) -> dict[str, nn.Module]:
        """Those of this kind."""
        if self.connector:
            return {"student": nn.Linear(student, teacher)}
        if student != teacher:
            raise ValueError(
                f"the student's features have {student} channels and the teacher's {teacher}; set connector = true"
            )
        return {}


class Hint(Connected):
    """Mean squared difference of features."""

    kind: Literal["hint"]
    reads = "any"

    def _of(self, student: Tensor, teacher: Tensor, label: Tensor | None) -> Tensor:
        return feature.hint(student, teacher)


class Attention(OfBlock):
    """Attention transfer."""

    kind: Literal["attention"]
    reads = "map"

    def _of(self, student: Tensor, teacher: Tensor, label: Tensor | None) -> Tensor:
        return feature.attention(student, teacher)


class Tokens(Connected):
    """KL over channels, at each position."""

    kind: Literal["tokens"]
    reads = "map"
    temperature: PositiveFloat = 1.0

    def _of(self, student: Tensor, teacher: Tensor, label: Tensor | None) -> Tensor:
        return feature.tokens(student, teacher, self.temperature)


class SelfSimilarity(OfBlock):
    """KL over the positions of an image, by their likeness."""

    kind: Literal["self_similarity"]
    reads = "map"
    temperature: PositiveFloat = 0.07

    def _of(self, student: Tensor, teacher: Tensor, label: Tensor | None) -> Tensor:
        return feature.self_similarity(student, teacher, self.temperature)


class Relation(OfBlock):
    """RKD's distances or angles, similarities (SP), neighbours (PKT)."""

    kind: Literal["distances", "angles", "similarities", "neighbours"]
    reads = "any"
    compares = True

    def _of(self, student: Tensor, teacher: Tensor, label: Tensor | None) -> Tensor:
        return RELATIONS[self.kind](student.flatten(1), teacher.flatten(1))


class Contrast(OfTeacher):
    """InfoNCE of both models' pooled features."""

    kind: Literal["contrast"]
    reads = "pooled"
    compares = True
    dim: Positive = 128
    temperature: PositiveFloat = 0.07

    def connectors(self, student: int, teacher: int) -> dict[str, nn.Module]:
        """Those of this kind."""
        return {"student": nn.Linear(student, self.dim), "teacher": nn.Linear(teacher, self.dim)}

    def _of(self, student: Tensor, teacher: Tensor, label: Tensor | None) -> Tensor:
        return contrast.contrast(student, teacher, self.temperature)


class Queue(OfTeacher):
    """The same neighbours among the teacher's features of earlier samples; pooled features."""

    kind: Literal["queue"]
    reads = "pooled"
    compares = True  # with samples of earlier steps: the step's own come in as a whole, once
    size: Positive = 8192
    """Features that are kept, on every rank."""
    temperature: PositiveFloat = 0.07

    def connectors(self, student: int, teacher: int) -> dict[str, nn.Module]:
        """Those of this kind."""
        return {"student": nn.Linear(student, teacher)}


Kind = Annotated[
    Labels | Hard | KL | DKD | DIST | Hint | Attention | Tokens | SelfSimilarity | Relation | Contrast | Queue,
    Field(discriminator="kind"),
]
