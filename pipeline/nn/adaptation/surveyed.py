"""Adaptation that knows how often each class comes in the target, by looking at all of it now and then.

Shape letters: B samples, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field
from torch import Tensor
from torch.nn import functional

from pipeline.config.durations import Duration
from pipeline.config.strict import Strict
from pipeline.core.protocols import Batch, StepContext, Survey
from pipeline.nn.adaptation.adaptation import Adaptation
from pipeline.nn.adaptation.shares import ClassShares


class SharesConfig(Strict):
    """When the classes' shares in the target are estimated."""

    every: Duration = Duration(1.0, "ep")
    """From one look at all of the target to the next, in passes over the source."""
    since: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Part of the run before which all classes count alike: what an untrained model says of the target is nothing."""


class SurveyedAdaptation(Adaptation):
    """Adaptation whose surveys keep :attr:`shares`, where they are wanted."""

    shares: ClassShares
    sharing: SharesConfig | None = None

    def estimate_shares(self, sharing: SharesConfig, *, decided: bool) -> ClassShares:
        """Have surveys of the target keep the classes' shares in it.

        Args:
            sharing: when.
            decided: count each sample for the class that it is taken for; else as the classifier's answer divides it.
        """
        self.sharing, self.decided = sharing, decided
        self.shares = ClassShares(len(self.classes))
        return self.shares

    def surveys(self) -> Mapping[str, Survey]:
        """What each target is taken for, where shares of classes are wanted."""
        if self.sharing is None:
            return {}
        return {f"shares.{target}": Survey(self.sharing.every, target) for target in self.settings.targets}

    def look(self, survey: str, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """What the classifier says of each sample, "answer", float32[B,K]."""
        logits = self.seen(batch["image"], batch, ctx)[1]
        if self.decided:
            return {"answer": functional.one_hot(logits.argmax(dim=1), len(self.classes)).float()}
        return {"answer": logits.softmax(dim=1)}

    def surveyed(self, survey: str, rows: dict[str, Tensor], ctx: StepContext) -> None:
        """Take over the shares of the target that is adapted to now."""
        assert self.sharing is not None
        if survey == f"shares.{self.target_at(ctx.clock.progress)}" and ctx.clock.progress >= self.sharing.since:
            self.shares.survey(rows["answer"])
