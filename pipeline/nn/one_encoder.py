"""What every objective says alike that trains one encoder of images, called ``encoder``."""

from __future__ import annotations

from torch import nn

from pipeline.nn.encoder import ImageEncoder


class OneEncoder(nn.Module):
    """Stands before ``Objective`` among an objective's bases."""

    encoder: ImageEncoder

    def encoders(self) -> dict[str, nn.Module]:
        """The encoder with its own pooling, without heads, on whole images."""
        return {"image": self.encoder}

    def no_weight_decay(self) -> set[str]:
        """What timm names for the backbone: positions and class token."""
        return self.encoder.no_weight_decay("encoder.")
