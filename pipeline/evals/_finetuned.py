"""What fine-tuning inside an evaluation trains: a copy of an encoder with a linear classifier, by cross-entropy.

Shape letters: B samples, D width, K classes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.core.protocols import Batch, Objective, StepContext, StepOutput
from pipeline.nn.batch_norm import synchronise
from pipeline.nn.dropout import drop_per_sample, dropping_for
from pipeline.nn.partial import rest, train_last
from pipeline.nn.reading import offered, trunk


class Classifier(Objective):
    """Encoder and head; the encoder that is given stays as it is.

    Args:
        encoder: of images; it is copied.
        weight: of the head at the start, float32[K,D].
        bias: of the head at the start, float32[K].
        trained: how many of the last layers of the encoder are trained, with whatever comes after them; 0: the head
            alone; None: all.
        label_smoothing: part of the target that is spread over all classes.

    Raises:
        ConfigError: the encoder has fewer layers than are to be trained, or none that are known.
    """

    def __init__(
        self, encoder: nn.Module, weight: Tensor, bias: Tensor, trained: int | None, label_smoothing: float
    ) -> None:
        super().__init__()
        self.needs = {"image": "uint8[B,C,H,W]", "label": "int64[B]"}
        self.encoder = copy.deepcopy(encoder).requires_grad_(trained != 0)
        drop_per_sample(self.encoder, "finetune")
        synchronise(self.encoder)
        self.head = nn.Linear(weight.shape[1], len(weight))
        self.label_smoothing = label_smoothing
        with torch.no_grad():
            self.head.weight.copy_(weight)
            self.head.bias.copy_(bias)
        if trained:
            train_last(self, self.layers(), trained)

    def forward(self, batch: Batch, ctx: StepContext) -> StepOutput:
        """Mean cross-entropy of a micro-batch, and how often it is right."""
        with dropping_for(batch, ctx):
            logits = self.head(self.encoder(batch["image"])).float()
        label = batch["label"]
        loss = functional.cross_entropy(logits, label, label_smoothing=self.label_smoothing)
        return StepOutput(loss, {"top1": (logits.detach().argmax(dim=1) == label).float().mean()})

    def train(self, mode: bool = True) -> Classifier:
        """What is not trained stays in eval mode: no drop path, no change of its statistics."""
        super().train(mode)
        rest(self.encoder)
        return self

    def encoders(self) -> Mapping[str, nn.Module]:
        """The classifier."""
        return {"logits": nn.Sequential(self.encoder, self.head)}

    def no_weight_decay(self) -> set[str]:
        """What timm names for the backbone."""
        return trunk(self.encoder).no_weight_decay(self._prefix()) if offered(self.encoder).blocks else set()

    def layers(self) -> Sequence[Sequence[str]]:
        """Those of the backbone; what follows it in the encoder, and the head, come after the last."""
        return trunk(self.encoder).layers(self._prefix()) if offered(self.encoder).blocks else ()

    def _prefix(self) -> str:
        """Of the names of the trunk's parameters."""
        own = trunk(self.encoder)
        name = next(name for name, module in self.encoder.named_modules() if module is own)
        return f"encoder.{name}." if name else "encoder."
