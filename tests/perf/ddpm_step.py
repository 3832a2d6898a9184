"""Training step of the 35.7M-parameter CIFAR-10 U-Net against diffusers' UNet2DModel of the same size; and sampling.

Command: python tests/perf/ddpm_step.py [--batch 8] [--repeats 5]
Both train in one bare loop (noise, squared error, backward, Adam), in turn, in the same process; ours with the fused
Adam that the engines build, theirs with torch's default. Prints seconds per step, the ratio theirs / ours over the
repeats, and what sampling costs beside the bare network; on a GPU in bf16, with images/s and memory. Needs diffusers.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from diffusers import UNet2DModel
from torch import nn

from pipeline.nn.conditioning import Conditions
from pipeline.nn.diffusion.levels import add_noise, schedule
from pipeline.nn.diffusion.model import Denoiser, Generator, SamplerConfig
from pipeline.nn.diffusion.process import Discrete
from pipeline.nn.unet import UNet, UNetConfig

LEVELS = schedule("linear", 1000)


def step_of(net: nn.Module, call: Callable[..., torch.Tensor], batch: int, fused: bool) -> Callable[[], None]:
    """One training step on fresh noise."""
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-4, fused=fused)
    device = next(net.parameters()).device
    image = torch.rand(batch, 3, 32, 32, device=device) * 2 - 1

    def step() -> None:
        index, noise = torch.randint(0, 1000, (batch,), device=device), torch.randn_like(image)
        x = add_noise(image, noise, LEVELS.at(index))
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=device.type == "cuda"):
            answer = call(x, index)
        (answer.float() - noise).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def seconds(work: Callable[[], object]) -> float:
    """Of one call, the device idle before and after."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mine = UNet(UNetConfig(), (32, 32), channels=3, out=3).to(device)
    other: nn.Module = UNet2DModel(
        sample_size=32, block_out_channels=(128, 256, 256, 256), layers_per_block=2, attention_head_dim=None,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6,
    )  # fmt: skip
    nn.Module.to(other, device)
    sizes = [sum(p.numel() for p in net.parameters()) for net in (mine, other)]
    print(f"parameters: ours {sizes[0]:,}, theirs {sizes[1]:,}; {device}, {torch.get_num_threads()} threads")
    ours = step_of(mine, lambda x, t: mine(x, Conditions(t)), args.batch, fused=True)
    theirs = step_of(other, lambda x, t: other(x, t).sample, args.batch, fused=False)
    for warm_up in (ours, theirs):
        warm_up()
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(args.repeats)]
    ratios = sorted(b / a for a, b in pairs)
    print(f"step, batch {args.batch}: ours {statistics.median(a for a, _ in pairs):.3f} s, ", end="")
    print(f"theirs {statistics.median(b for _, b in pairs):.3f} s")
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 1e9
        print(f"ours {args.batch / statistics.median(a for a, _ in pairs):.0f} images/s; peak memory {peak:.2f} GB")
    print(f"ratio theirs / ours: median {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")

    sampler = SamplerConfig(name="ddim", steps=4)
    generator = Generator(Denoiser(mine, "noise", False), Discrete(LEVELS), (3, 32, 32), "small", sampler).eval()
    ids, x = torch.arange(args.batch, device=device), torch.randn(args.batch, 3, 32, 32, device=device)

    def bare() -> None:
        for _ in range(sampler.steps):
            mine(x, Conditions(torch.zeros(args.batch, device=device)))

    with torch.no_grad():
        pairs = [(seconds(lambda: generator.sample(ids, None, 0)), seconds(bare)) for _ in range(args.repeats)]
    costs = sorted(a / b - 1 for a, b in pairs)
    middle = statistics.median(costs)
    print(f"sampling beside the bare network: median {middle:+.1%} ({costs[0]:+.1%} to {costs[-1]:+.1%})")


if __name__ == "__main__":
    main()
