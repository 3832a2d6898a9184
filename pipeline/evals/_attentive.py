"""Attentive probes, several at once: learned queries look at frozen patches, a linear layer at what they see.

The pooling of El-Nouby et al., "Scalable Pre-training of Large Autoregressive Image Models" (AIM, ICML 2024): keys and
values are linear in the patches, the query is a parameter, there are heads, and no block follows. Since the query does
not depend on the image, keys are never made: a head's scores are products of the patches with one vector, and values
are made of the patches' weighted mean. So twenty probes cost little beside the encoder, which runs once for all.
Shape letters: B samples, T patches, D width, P probes, H heads, C = D / H, Q queries, K classes, N of the stream.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.core.protocols import Batch, Objective, StepContext, StepOutput
from pipeline.evals._classified import guesses
from pipeline.nn.reading import patches

START = 0.02
"""Standard deviation of initial weights; the classifier's is 0.01."""


class AttentiveProbe(nn.Module):
    """One probe's parameters.

    Args:
        width: D.
        classes: K.
        queries: Q; what they see is averaged.
        seed: of the initial weights.
    """

    def __init__(self, width: int, classes: int, queries: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def drawn(*shape: int, std: float = START) -> nn.Parameter:
            return nn.Parameter(std * torch.randn(shape, generator=generator))

        self.query = drawn(queries, width)
        self.key = drawn(width, width)
        self.value = drawn(width, width)
        self.weight = drawn(classes, width, std=0.01)
        self.bias = nn.Parameter(torch.zeros(classes))


class AttentiveProbes(nn.Module):
    """Probes of one shape, computed together: patches float[B,T,D] to logits float32[P,B,K]."""

    def __init__(self, count: int, width: int, classes: int, heads: int, queries: int, seed: int) -> None:
        super().__init__()
        self.heads = heads
        self.probes = nn.ModuleList(AttentiveProbe(width, classes, queries, seed) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of every probe."""
        query, key, value, weight, bias = (
            torch.stack([probe.get_parameter(name) for probe in self.probes])
            for name in ("query", "key", "value", "weight", "bias")
        )
        p, q, d = query.shape
        h, c = self.heads, d // self.heads
        # q . (W_k x) of each head is (W_k^T q) . x
        looked = torch.einsum("pqhc,phcd->pqhd", query.view(p, q, h, c), key.view(p, h, c, d)) * c**-0.5
        scores = torch.einsum("btd,rd->brt", x, looked.reshape(p * q * h, d)).view(len(x), p, q, h, -1)
        share = scores.float().softmax(dim=-1).mean(dim=2).to(x.dtype)
        seen = torch.einsum("bpht,btd->pbhd", share, x)
        mixed = torch.einsum("pbhd,phcd->pbhc", seen, value.view(p, h, c, d)).flatten(2)
        return torch.baddbmm(bias[:, None], mixed, weight.transpose(1, 2)).float()


class Attentive(Objective):
    """Trains probes on a frozen encoder, each as it would be alone.

    Args:
        encoder: of images, with blocks; it is not part of what is trained.
        probes: on its device or not.
        held: bool[N], the samples that are not trained on: their loss counts nothing.
    """

    held: Tensor

    def __init__(self, encoder: nn.Module, probes: AttentiveProbes, held: Tensor) -> None:
        super().__init__()
        self.needs = {"image": "uint8[B,C,H,W]", "label": "int64[B]"}
        self.probes = probes
        self.register_buffer("held", held)
        self._frozen = (encoder,)  # in a tuple it is no module of this one

    def forward(self, batch: Batch, ctx: StepContext) -> StepOutput:
        """The sum over probes of the cross-entropy, over as many samples as are trained on in the mean."""
        logits, label = self.logits(batch["image"]), batch["label"]
        each = functional.cross_entropy(logits.flatten(0, 1), label.repeat(len(logits)), reduction="none")
        kept = ~self.held[batch["id"]]
        loss = (each.view(len(logits), -1) * kept).sum() / (len(label) * (1 - self.held.float().mean()))
        return StepOutput(loss, {"top1": (logits.detach().argmax(dim=2) == label).float().mean()})

    def logits(self, image: Tensor) -> Tensor:
        """float32[P,B,K] of uint8[B,C,H,W]."""
        return self.probes(tokens(self._frozen[0], image))

    def guessing(self) -> Guessing:
        """What the probes take images for."""
        return Guessing(self._frozen[0], self.probes)

    def encoders(self) -> Mapping[str, nn.Module]:
        """None that anybody else may use."""
        return {}


class Guessing(nn.Module):
    """Images to the guesses of every probe, float32[B,P*G], best first: so many numbers instead of so many logits."""

    def __init__(self, encoder: nn.Module, probes: AttentiveProbes) -> None:
        super().__init__()
        self.encoder, self.probes = encoder, probes

    def forward(self, image: Tensor) -> Tensor:
        """Guesses of a batch, uint8[B,C,H,W]."""
        logits = self.probes(tokens(self.encoder, image))
        best = guesses(logits.flatten(0, 1)).view(*logits.shape[:2], -1)
        return best.masked_fill(~logits.isfinite().all(dim=2, keepdim=True), -1).transpose(0, 1).flatten(1).float()


@torch.no_grad()
def tokens(encoder: nn.Module, image: Tensor) -> Tensor:
    """The last block's patches, float[B,T,D]."""
    return patches(encoder, image).flatten(2).transpose(1, 2)
