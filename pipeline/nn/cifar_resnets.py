"""Residual networks for images of 32 pixels, which timm does not have: under its interface, and found by name there.

``resnet8x4``: He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016), section 4.2, four times as wide;
``wrn_16_2``: Zagoruyko and Komodakis, "Wide Residual Networks" (BMVC 2016), of depth 16 and twice as wide. As
distillation on CIFAR-100 has them since Tian et al., "Contrastive Representation Distillation" (ICLR 2020), whose code
(HobbitLong/RepDistiller) also gives parameters their names, so that its files of weights fit.
Shape letters: B images, C channels, h, w rows and columns of a map, K classes.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise
from typing import Any, NamedTuple

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional


class Shape(NamedTuple):
    """Of a network."""

    depth: int
    """Layers: 6 n + 2, or 6 n + 4 of wide ones."""
    widths: tuple[int, int, int, int]
    """Channels of the stem, and of each stage."""
    wide: bool = False
    """Blocks are :class:`PreActivated`, and a norm comes last; else :class:`Basic`, and it comes behind the stem."""


SHAPES = {
    "resnet20": Shape(20, (16, 16, 32, 64)),
    "resnet32": Shape(32, (16, 16, 32, 64)),
    "resnet56": Shape(56, (16, 16, 32, 64)),
    "resnet110": Shape(110, (16, 16, 32, 64)),
    "resnet8x4": Shape(8, (32, 64, 128, 256)),
    "resnet32x4": Shape(32, (32, 64, 128, 256)),
    "wrn_16_2": Shape(16, (16, 32, 64, 128), wide=True),
    "wrn_40_1": Shape(40, (16, 16, 32, 64), wide=True),
    "wrn_40_2": Shape(40, (16, 32, 64, 128), wide=True),
}
"""Names as RepDistiller has them."""
CIFAR100 = {"mean": (0.5071, 0.4867, 0.4408), "std": (0.2675, 0.2565, 0.2761)}
"""Of each channel, as it normalises."""
default_cfgs = generate_default_cfgs(
    {
        name: {"num_classes": 100, "input_size": (3, 32, 32), "first_conv": "conv1", "classifier": "fc", **CIFAR100}
        for name in SHAPES
    }
)
"""Where timm looks for what it knows of a model."""
LAST = (99999,)
"""Of a matcher: together with the block before."""


def _convolution(inside: int, outside: int, side: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, side, stride, side // 2, bias=False)


class Basic(nn.Module):
    """Two convolutions, each followed by its norm; He et al. 2016."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _convolution(inside, outside, 3, stride), nn.BatchNorm2d(outside)
        self.conv2, self.bn2 = _convolution(outside, outside, 3, 1), nn.BatchNorm2d(outside)
        self.downsample = None
        if inside != outside or stride != 1:
            self.downsample = nn.Sequential(_convolution(inside, outside, 1, stride), nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,h,w]."""
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return functional.relu(y + (x if self.downsample is None else self.downsample(x)))


class PreActivated(nn.Module):
    """Two convolutions, each behind its norm; a shortcut that changes the width is behind the first."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inside), _convolution(inside, outside, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outside), _convolution(outside, outside, 3, 1)
        self.convShortcut = None if inside == outside else _convolution(inside, outside, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,h,w]."""
        y = functional.relu(self.bn1(x))
        short = x if self.convShortcut is None else self.convShortcut(y)
        return short + self.conv2(functional.relu(self.bn2(self.conv1(y))))


class CifarResNet(nn.Module):
    """A stem, three stages, of which the last two halve the sides, and a classifier of the pooled map.

    Args:
        shape: of the network.
        num_classes: K; 0: no classifier.
        in_chans: C of the images.
        global_pool: "avg", or "": the map itself.
    """

    def __init__(self, shape: Shape, num_classes: int = 100, in_chans: int = 3, global_pool: str = "avg") -> None:
        super().__init__()
        depth, widths, self.wide = shape
        self.num_features = self.head_hidden_size = widths[-1]
        self.conv1 = _convolution(in_chans, widths[0], 3, 1)
        self.bn1 = nn.BatchNorm2d(widths[-1] if self.wide else widths[0])
        block, blocks = (PreActivated, (depth - 4) // 6) if self.wide else (Basic, (depth - 2) // 6)
        self.stages: list[str] = []
        for number, (inside, outside) in enumerate(pairwise(widths), 1):
            first = block(inside, outside, 1 if number == 1 else 2)
            stage = nn.Sequential(first, *(block(outside, outside, 1) for _ in range(1, blocks)))
            self.stages.append(f"{'block' if self.wide else 'layer'}{number}")
            self.add_module(self.stages[-1], nn.Sequential(OrderedDict(layer=stage)) if self.wide else stage)
        self.reset_classifier(num_classes, global_pool)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Another classifier, for K classes; 0: none."""
        self.num_classes = num_classes
        self.global_pool = self.global_pool if global_pool is None else global_pool
        self.fc: nn.Module = nn.Identity()
        if num_classes:
            self.fc = linear = nn.Linear(self.num_features, num_classes)
            if self.wide:
                nn.init.zeros_(linear.bias)

    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.fc

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Refused: so small a network has no use for it."""
        assert not enable, "gradient checkpointing is not supported"

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameters' names: the stem, and blocks (``coarse``: stages)."""
        stage, block = (r"^block(\d+)", r"\.layer\.(\d+)") if self.wide else (r"^layer(\d+)", r"\.(\d+)")
        if not self.wide:
            return {"stem": r"^conv1|^bn1", "blocks": stage if coarse else stage + block}
        return {"stem": r"^conv1", "blocks": [(stage if coarse else stage + block, None), (r"^bn1", LAST)]}

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map, [B,D,h,w], of images [B,C,H,W]."""
        x = self.conv1(x)
        if not self.wide:
            x = functional.relu(self.bn1(x))
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return functional.relu(self.bn1(x)) if self.wide else x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooled, [B,D], or logits, [B,K]."""
        if self.global_pool:
            x = x.mean(dim=(2, 3))
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B,K]; pooled features where there is no classifier."""
        return self.forward_head(self.forward_features(x))


def _register(name: str, shape: Shape) -> None:
    """Tell timm of a model."""

    def build(pretrained: bool = False, **given: Any) -> CifarResNet:
        return build_model_with_cfg(CifarResNet, name, pretrained, shape=shape, **given)

    build.__name__ = name
    register_model(build)


for _name, _shape in SHAPES.items():
    _register(_name, _shape)
