"""The text encoder against a plain transcription of it."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.nn.text import TextEncoder

SIZES = {"vocab": 20, "length": 9, "width": 8, "depth": 2, "heads": 2, "dim": 5}


def plain(model: TextEncoder, tokens: list[int], causal: bool) -> Tensor:
    """One text without padding, attention written out for each head and position."""
    w = dict(model.named_parameters())
    x = torch.stack([w["token_embedding.weight"][t] + w["positions"][i] for i, t in enumerate(tokens)])
    for block in range(2):
        p = {n.removeprefix(f"blocks.{block}."): v for n, v in w.items() if n.startswith(f"blocks.{block}.")}
        y = functional.layer_norm(x, (8,), p["norm1.weight"], p["norm1.bias"], 1e-5)
        q, k, v = (y @ p["attn.qkv.weight"].T + p["attn.qkv.bias"]).split(8, dim=1)
        mixed = torch.zeros_like(x)
        for head in (slice(0, 4), slice(4, 8)):
            for i in range(len(tokens)):
                seen = range(i + 1) if causal else range(len(tokens))
                scores = torch.stack([q[i, head] @ k[j, head] / math.sqrt(4) for j in seen]).softmax(dim=0)
                mixed[i, head] = sum(s * v[j, head] for s, j in zip(scores, seen, strict=True))
        x = x + mixed @ p["attn.proj.weight"].T + p["attn.proj.bias"]
        y = functional.layer_norm(x, (8,), p["norm2.weight"], p["norm2.bias"], 1e-5)
        x = (
            x
            + functional.gelu(y @ p["mlp.fc1.weight"].T + p["mlp.fc1.bias"]) @ p["mlp.fc2.weight"].T
            + p["mlp.fc2.bias"]
        )
    x = functional.layer_norm(x, (8,), w["norm.weight"], w["norm.bias"], 1e-5)
    return (x[-1] if causal else x.mean(dim=0)) @ w["projection.weight"].T


@pytest.mark.parametrize("pool", ["end", "mean"])
def test_each_text_by_hand_and_padding_does_not_matter(pool):
    torch.manual_seed(0)
    model = TextEncoder(**SIZES, pool=pool)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
        texts = [[3, 7, 7, 19], [1], [5, 0, 2, 4, 6, 8, 10, 12, 0]]
        lengths = torch.tensor([len(t) for t in texts])
        for filler in (0, 11):
            padded = torch.tensor([t + [filler] * (9 - len(t)) for t in texts])
            found = model(padded, lengths)
            for row, text in zip(found, texts, strict=True):
                torch.testing.assert_close(row, plain(model, text, pool == "end"), rtol=1e-4, atol=1e-5)
        short = model(padded[:2, :5], lengths[:2])
        torch.testing.assert_close(short, found[:2], rtol=1e-4, atol=1e-5)


def test_initial_weights_are_clips():
    torch.manual_seed(0)
    model = TextEncoder(vocab=1000, length=64, width=128, depth=4, heads=2, dim=64, pool="end")
    w = dict(model.named_parameters())
    expected = {
        "token_embedding.weight": 0.02,
        "positions": 0.01,
        "blocks.3.attn.qkv.weight": 128**-0.5,
        "blocks.0.attn.proj.weight": 128**-0.5 * 8**-0.5,
        "blocks.1.mlp.fc1.weight": 256**-0.5,
        "blocks.2.mlp.fc2.weight": 128**-0.5 * 8**-0.5,
        "projection.weight": 128**-0.5,
    }
    for name, std in expected.items():
        assert float(w[name].detach().std()) == pytest.approx(std, rel=0.05), name
    assert not w["blocks.0.attn.qkv.bias"].any()
