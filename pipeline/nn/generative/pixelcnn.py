"""PixelCNN++: the pixels of an image one after the other, each as the ones before it let expect.

Salimans et al., "PixelCNN++: Improving the PixelCNN with Discretized Logistic Mixture Likelihood and Other
Modifications" (ICLR 2017), https://arxiv.org/abs/1701.05517; two streams of gated residual blocks on several sizes,
with shortcuts between the way down and the way up. Written from the paper and its figure 2.
Shape letters: B samples, C channels, H height, W width, P numbers that are said of a pixel.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config.schema import Strict
from pipeline.core.errors import ConfigError
from pipeline.nn.generative.causal_convolution import (
    ABOVE,
    ASIDE,
    HERE,
    LEFT,
    PLACES,
    ROW_ABOVE,
    ROWS,
    ROWS_ABOVE,
    Convolution,
    Gated,
    Hidden,
    Part,
    Plain,
    Twice,
    Whole,
    held,
)
from pipeline.nn.generative.mixture import LogisticMixture


class PixelCNNConfig(Strict):
    """Settings; the defaults are the authors' for CIFAR-10."""

    name: Literal["pixelcnn"] = "pixelcnn"
    filters: Annotated[int, Field(ge=1)] = 160
    """Channels of every map."""
    blocks: Annotated[int, Field(ge=1)] = 5
    """Residual blocks at each size on the way down; on the way up one more, but at the smallest."""
    sizes: Annotated[int, Field(ge=1)] = 3
    """Each half the one before."""
    components: Annotated[int, Field(ge=1)] = 10
    """Of the mixture."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5


class Node(NamedTuple):
    """A map of the network."""

    inputs: tuple[int, ...]
    """Numbers of the maps that its layer sees; 0 is the image."""
    halved: int
    """How often the image's size is halved for it."""
    above: bool
    """Of the stream that sees the rows above alone, so that a row of it is known at once."""


class PixelCNN(nn.Module):
    """The network and the mixture that it speaks of.

    Args:
        config: sizes.
        shape: C, H, W.
        classes: that it may be told; 0: none.
        levels: values of a channel.

    Raises:
        ConfigError: the image cannot be halved so often.
    """

    def __init__(
        self, config: PixelCNNConfig, shape: tuple[int, int, int], classes: int = 0, levels: int = 256
    ) -> None:
        super().__init__()
        factor = 2 ** (config.sizes - 1)
        if shape[1] % factor or shape[2] % factor:
            raise ConfigError(
                f"network.sizes = {config.sizes}, each half the one before, needs images of multiples of {factor} "
                f"pixels; they are {shape[1]}x{shape[2]}; take other images (data.image.size), or fewer sizes"
            )
        self.config, self.shape, self.classes = config, shape, classes
        self.mixture = LogisticMixture(shape[0], config.components, levels)
        self.nodes: list[Node] = []
        self.layers = nn.ModuleList()
        self.middle = self._wire()
        self.head = Convolution(config.filters, self.mixture.numbers, HERE)

    @property
    def dim(self) -> int:
        """Size of :meth:`features`."""
        return 2 * self.config.filters

    def _add(self, layer: nn.Module, inputs: tuple[int, ...], halved: int, above: bool) -> int:
        self.layers.append(layer)
        self.nodes.append(Node(inputs, halved, above))
        return len(self.nodes)

    def _block(self, x: int, others: tuple[int, ...], halved: int, above: bool) -> int:
        width, reach = self.config.filters, ROWS if above else PLACES
        inner = self._add(Hidden(width, reach, len(others)), (x, *others), halved, above)
        gate = Gated(width, reach, self.config.dropout, self.classes, f"pixelcnn.{inner}")
        return self._add(gate, (x, inner), halved, above)

    def _wire(self) -> tuple[int, int]:
        """Lay out the maps; returns those in the middle of both streams."""
        width, inside, blocks = self.config.filters, self.shape[0] + 1, self.config.blocks
        up = self._add(Plain(inside, width, ROWS_ABOVE), (0,), 0, above=True)
        left = self._add(Plain(inside, width, ROW_ABOVE, LEFT), (0,), 0, above=False)
        ups, lefts = [up], [left]
        for halved in range(self.config.sizes):
            if halved:
                up = self._add(Plain(width, width, ROWS.halving()), (up,), halved, above=True)
                left = self._add(Plain(width, width, PLACES.halving()), (left,), halved, above=False)
                ups.append(up)
                lefts.append(left)
            for _ in range(blocks):
                up = self._block(up, (), halved, above=True)
                left = self._block(left, (up,), halved, above=False)
                ups.append(up)
                lefts.append(left)
        middle = up, left = ups.pop(), lefts.pop()
        for halved in reversed(range(self.config.sizes)):
            if halved < self.config.sizes - 1:
                up = self._add(Twice(width, 3), (up,), halved, above=True)
                left = self._add(Twice(width, 2), (left,), halved, above=False)
            for _ in range(blocks + (halved < self.config.sizes - 1)):
                up = self._block(up, (ups.pop(),), halved, above=True)
                left = self._block(left, (up, lefts.pop()), halved, above=False)
        assert not ups and not lefts
        return middle

    def _maps(self, image: Tensor, label: Tensor | None) -> list[Tensor]:
        """All maps, the input's first: the pixels, and ones where the image is."""
        x = self.mixture.scaled(image, self.head.direction)
        maps = [torch.cat([x, torch.ones_like(x[:, :1])], dim=1)]
        for layer, node in zip(self.layers, self.nodes, strict=True):
            maps.append(layer([Whole(maps[i]) for i in node.inputs], label))
        return maps

    def forward(self, image: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What is said of each pixel, and features of the image.

        Args:
            image: uint8[B,C,H,W].
            label: int64[B], of a model with classes; None: the mean of what they stand for.

        Returns:
            [B,P,H,W], of each pixel by those before it; float[B,2F], the mean over places of the smallest maps.
        """
        maps = self._maps(image, label)
        features = torch.cat([maps[i].mean(dim=(2, 3)) for i in self.middle], dim=1)
        return self.head(functional.elu(maps[-1])), features

    def log_likelihood(self, image: Tensor, said: Tensor) -> Tensor:
        """In nats: uint8[B,C,H,W] and what :meth:`forward` says, to at least float32[B]."""
        return self.mixture.log_likelihood(image, said)

    @torch.no_grad()
    def sample(self, uniform: Tensor, label: Tensor | None = None) -> Tensor:
        """Make images, computing of each map what a new pixel adds to it.

        Args:
            uniform: float32[B,HW,1+C], from 0 to 1: of each pixel, for the component and for each channel.
            label: int64[B], of a model with classes.

        Returns:
            uint8[B,C,H,W].
        """
        channels, height, width = self.shape
        made = torch.zeros(len(uniform), channels, height, width, dtype=torch.uint8, device=uniform.device)
        with held(self):
            maps = self._empty(len(uniform))
            for row in range(height):
                self._extend(maps, row, None, label)
                for column in range(width):
                    self._extend(maps, row, column, label)
                    said = self.head(functional.elu(Part(maps[-1], row, column).here()))[..., 0, 0]
                    pixel = self.mixture.sample(said, uniform[:, row * width + column])
                    made[..., row, column] = pixel
                    maps[0][:, :-1, ABOVE + row, ASIDE + column] = self.mixture.scaled(pixel, maps[0])
        return made

    @torch.no_grad()
    def sample_naively(self, uniform: Tensor, label: Tensor | None = None) -> Tensor:
        """The same, computing all maps anew for each pixel: what :meth:`sample` is held against."""
        channels, height, width = self.shape
        made = torch.zeros(len(uniform), channels, height, width, dtype=torch.uint8, device=uniform.device)
        for row in range(height):
            for column in range(width):
                said = self(made, label)[0][..., row, column]
                made[..., row, column] = self.mixture.sample(said, uniform[:, row * width + column])
        return made

    def _empty(self, samples: int) -> list[Tensor]:
        """All maps before the first pixel, with zeros around them."""
        like, widths = self.head.direction, [self.shape[0] + 1] + [self.config.filters] * len(self.nodes)
        halved = [0, *(node.halved for node in self.nodes)]
        height, width = self.shape[1:]
        maps = [
            like.new_zeros(samples, channels, ABOVE + (height >> h), (width >> h) + 2 * ASIDE)
            for channels, h in zip(widths, halved, strict=True)
        ]
        maps[0][:, -1, ABOVE:, ASIDE:-ASIDE] = 1
        return maps

    def _extend(self, maps: list[Tensor], row: int, column: int | None, label: Tensor | None) -> None:
        """Compute a row of the stream that sees the rows above; or a place of the other."""
        for number, (layer, node) in enumerate(zip(self.layers, self.nodes, strict=True), 1):
            step = 1 << node.halved
            if node.above != (column is None) or row % step or (column or 0) % step:
                continue
            y, x = row // step, None if column is None else column // step
            views: list[Any] = [Part(maps[i], y, x) for i in node.inputs]
            there = slice(ASIDE, -ASIDE) if x is None else slice(ASIDE + x, ASIDE + x + 1)
            maps[number][:, :, ABOVE + y : ABOVE + y + 1, there] = layer(views, label)
