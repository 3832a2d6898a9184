"""A plain reading of masked autoencoding, in the steps and the order of the paper and of its authors' code.

He et al., CVPR 2022, section 3; explicit attention, explicit masks of zeros and ones, no fused kernels. It shares no
code with the project: tests compare losses with it, the benchmark its speed. Weights come in timm's names.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Weights = dict[str, Tensor]


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def norm(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)


def attention(w: Weights, name: str, x: Tensor, heads: int) -> Tensor:
    n, length, dim = x.shape
    qkv = linear(w, f"{name}.qkv", x).reshape(n, length, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
    q, k, v = qkv[0], qkv[1], qkv[2]
    weights = (q @ k.transpose(-2, -1)) * (dim // heads) ** -0.5
    x = (weights.softmax(dim=-1) @ v).transpose(1, 2).reshape(n, length, dim)
    return linear(w, f"{name}.proj", x)


def block(w: Weights, name: str, x: Tensor, heads: int) -> Tensor:
    x = x + attention(w, f"{name}.attn", norm(w, f"{name}.norm1", x), heads)
    h = F.gelu(linear(w, f"{name}.mlp.fc1", norm(w, f"{name}.norm2", x)))
    return x + linear(w, f"{name}.mlp.fc2", h)


def blocks(w: Weights, name: str, x: Tensor, heads: int) -> Tensor:
    depth = 1 + max(int(key.split(".")[2]) for key in w if key.startswith(f"{name}."))
    for i in range(depth):
        x = block(w, f"{name}.{i}", x, heads)
    return x


def patches_of(imgs: Tensor, p: int) -> Tensor:
    """[N,3,H,W] to [N,L,p*p*3]."""
    n, c, height, width = imgs.shape
    h, w = height // p, width // p
    x = imgs.reshape(n, c, h, p, w, p)
    return torch.einsum("nchpwq->nhwpqc", x).reshape(n, h * w, p * p * c)


def positions_1d(dim: int, pos: np.ndarray) -> np.ndarray:
    omega = np.arange(dim // 2, dtype=float)
    omega /= dim / 2.0
    omega = 1.0 / 10000**omega
    out = np.einsum("m,d->md", pos.reshape(-1), omega)
    return np.concatenate([np.sin(out), np.cos(out)], axis=1)


def positions_2d(dim: int, height: int, width: int) -> Tensor:
    """[1,1+L,dim]; the class token's row is zero."""
    grid_h = np.arange(height, dtype=np.float32)
    grid_w = np.arange(width, dtype=np.float32)
    grid = np.meshgrid(grid_w, grid_h)  # here w goes first
    table = np.concatenate([positions_1d(dim // 2, grid[0]), positions_1d(dim // 2, grid[1])], axis=1)
    table = np.concatenate([np.zeros([1, dim]), table], axis=0)
    return torch.from_numpy(table).float().unsqueeze(0)


def random_masking(x: Tensor, noise: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the patches of least noise; the mask is 0 where kept and 1 where removed."""
    n, length, dim = x.shape
    ids_shuffle = torch.argsort(noise, dim=1)
    ids_restore = torch.argsort(ids_shuffle, dim=1)
    ids_keep = ids_shuffle[:, :keep]
    x_masked = torch.gather(x, 1, ids_keep.unsqueeze(-1).repeat(1, 1, dim))
    mask = torch.ones(n, length, dtype=x.dtype)
    mask[:, :keep] = 0
    return x_masked, torch.gather(mask, 1, ids_restore), ids_restore


def loss(
    w: Weights,
    imgs: Tensor,
    noise: Tensor,
    *,
    patch: int,
    keep: int,
    heads: tuple[int, int],
    norm_pix: bool = True,
) -> Tensor:
    """The loss of one batch.

    Args:
        w: weights, without position tables, under "encoder." and "decoder.".
        imgs: normalised, [N,3,H,W].
        noise: [N,L]; the ``keep`` patches of least noise are visible.
        patch: side of a patch in pixels.
        keep: visible patches.
        heads: of the encoder and of the decoder.
        norm_pix: normalise each target patch.
    """
    x = F.conv2d(imgs, w["encoder.patch_embed.proj.weight"], w["encoder.patch_embed.proj.bias"], stride=patch)
    x = x.flatten(2).transpose(1, 2)
    pos_embed = positions_2d(x.shape[2], imgs.shape[2] // patch, imgs.shape[3] // patch)
    x = x + pos_embed[:, 1:, :]
    x, mask, ids_restore = random_masking(x, noise, keep)
    cls_token = w["encoder.cls_token"] + pos_embed[:, :1, :]
    x = torch.cat((cls_token.expand(x.shape[0], -1, -1), x), dim=1)
    x = norm(w, "encoder.norm", blocks(w, "encoder.blocks", x, heads[0]))

    x = linear(w, "decoder.embed", x)
    mask_tokens = w["decoder.mask_token"].repeat(x.shape[0], ids_restore.shape[1] + 1 - x.shape[1], 1)
    x_ = torch.cat([x[:, 1:, :], mask_tokens], dim=1)
    x_ = torch.gather(x_, 1, ids_restore.unsqueeze(-1).repeat(1, 1, x.shape[2]))
    x = torch.cat([x[:, :1, :], x_], dim=1)
    x = x + positions_2d(x.shape[2], imgs.shape[2] // patch, imgs.shape[3] // patch)
    x = norm(w, "decoder.norm", blocks(w, "decoder.blocks", x, heads[1]))
    pred = linear(w, "decoder.predict", x)[:, 1:, :]

    target = patches_of(imgs, patch)
    if norm_pix:
        mean = target.mean(dim=-1, keepdim=True)
        var = target.var(dim=-1, keepdim=True)
        target = (target - mean) / (var + 1.0e-6) ** 0.5
    error = ((pred - target) ** 2).mean(dim=-1)
    return (error * mask).sum() / mask.sum()
