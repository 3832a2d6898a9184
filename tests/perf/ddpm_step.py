"""Training step of the 35.7M-parameter CIFAR-10 U-Net against diffusers' UNet2DModel of the same size; and sampling.

Command: python -m tests.perf.ddpm_step [--batch 8] [--repeats 5] [--steps 1] [--compile] [--processor-time]
Both train in one bare loop (noise, squared error, backward, Adam), in turn, in the same process; ours with the fused
Adam that the engines build, theirs with torch's default. Prints seconds per step, the ratio theirs / ours over the
repeats, and what sampling costs beside as many evaluations of the bare network; on a GPU all in bf16, with images/s,
model FLOP utilisation (PaLM's appendix B, as in mae_gpu.py) and peak memory of each. Without diffusers, ours alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.nn.conditioning import Conditions
from pipeline.nn.diffusion.levels import add_noise, schedule
from pipeline.nn.diffusion.model import Denoiser, Generator, SamplerConfig
from pipeline.nn.diffusion.process import Discrete
from pipeline.nn.unet import UNet, UNetConfig
from tests.perf.mae_gpu import peak_of

LEVELS = schedule("linear", 1000)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SAMPLED = 20 if DEVICE == "cuda" else 4
"""Levels that the samplers visit."""


def build_ours() -> UNet:
    """The default network."""
    return UNet(UNetConfig(), (32, 32), channels=3, out=3).to(DEVICE)


def build_theirs() -> nn.Module:
    """The same network in diffusers."""
    from diffusers import UNet2DModel

    model: nn.Module = UNet2DModel(
        sample_size=32, block_out_channels=(128, 256, 256, 256), layers_per_block=2, attention_head_dim=None,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6,
    )  # fmt: skip
    return nn.Module.to(model, DEVICE)


def bf16() -> torch.autocast:
    """On a GPU alone."""
    return torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda")


def trained(net: nn.Module, call: Callable[[Tensor, Tensor], Tensor], batch: int, fused: bool) -> Callable[[], object]:
    """One training step on fresh noise."""
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-4, fused=fused or None)
    image = torch.rand(batch, 3, 32, 32, device=DEVICE) * 2 - 1

    def step() -> None:
        index, noise = torch.randint(0, 1000, (batch,), device=DEVICE), torch.randn_like(image)
        x = add_noise(image, noise, LEVELS.at(index))
        with bf16():
            answer = call(x, index)
        (answer.float() - noise).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


clock = time.perf_counter


def seconds(work: Callable[[], object], times: int) -> float:
    """Of one call, the device idle before and after ``times`` of them."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    begin = clock()
    for _ in range(times):
        work()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return (clock() - begin) / times


def in_turn(work: Sequence[Callable[[], object]], repeats: int, times: int) -> list[list[float]]:
    """Seconds of each, ``repeats`` times over."""
    rounds = [[seconds(one, times) for one in work] for _ in range(repeats)]
    return [list(column) for column in zip(*rounds, strict=True)]


@torch.no_grad()
def forward_flops(net: nn.Module) -> int:
    """Operations (two per multiply-add) of convolutions and matrix products in one image's forward."""
    # Fused attention of some devices is not among the operations that torch can count.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, 3, 32, 32, device=DEVICE), Conditions(torch.zeros(1, device=DEVICE)))
    return counter.get_total_flops()


def compiled() -> UNet:
    """Ours with its blocks compiled, as ``objective.compile`` does it."""
    net = build_ours()
    for block in net.blocks:
        block.compile()
    return net


def prepared(name: str, build: Callable[[], nn.Module], batch: int) -> tuple[nn.Module, Callable[[], object]]:
    """A network and its training step, warmed up; says what it takes."""
    held = torch.cuda.memory_allocated() if DEVICE == "cuda" else 0
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    net = build()
    if isinstance(net, UNet):
        step = trained(net, lambda x, t: net(x, Conditions(t)), batch, fused=True)
    else:
        step = trained(net, lambda x, t: net(x, t).sample, batch, fused=False)
    seconds(step, 3 if DEVICE == "cuda" else 1)
    print(f"{name}: {sum(p.numel() for p in net.parameters()):,} parameters", end="")
    print(f", at most {(torch.cuda.max_memory_allocated() - held) / 2**30:.2f} GiB" if DEVICE == "cuda" else "")
    return net, step


def train(batch: int, repeats: int, times: int, with_compiled: bool) -> UNet:
    """Measure and print training; returns our network."""
    net, step = prepared("ours", build_ours, batch)
    work = {"ours": step}
    if with_compiled:
        work["compiled"] = prepared("compiled", compiled, batch)[1]
    if importlib.util.find_spec("diffusers"):
        work["theirs"] = prepared("theirs", build_theirs, batch)[1]
    found = dict(zip(work, in_turn(list(work.values()), repeats, times), strict=True))
    flops = 3 * forward_flops(net) * batch
    peak = peak_of(torch.cuda.get_device_name()) if DEVICE == "cuda" else None
    for name, taken in found.items():
        middle = statistics.median(taken)
        used = f", {flops / middle / peak:.1%} of {peak / 1e12:.0f} TFLOP/s" if peak else ""
        print(
            f"{name}: {middle:.4f} s a step ({min(taken):.4f} to {max(taken):.4f}), {batch / middle:.1f} images/s, "
            f"{flops / middle / 1e12:.2f} TFLOP/s{used}"
        )
    for name in set(found) - {"theirs"} if "theirs" in found else ():
        ratios = [b / a for a, b in zip(found[name], found["theirs"], strict=True)]
        print(f"ratio theirs / {name}: median {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    assert isinstance(net, UNet)
    return net


@torch.no_grad()
def sample(net: UNet, batch: int, repeats: int, times: int) -> None:
    """Measure and print sampling beside as many evaluations of the bare network."""
    generator = Generator(Denoiser(net, "noise", False), Discrete(LEVELS), (3, 32, 32), "small", SamplerConfig()).eval()
    ids, x = torch.arange(batch, device=DEVICE), torch.randn(batch, 3, 32, 32, device=DEVICE)

    def bare() -> None:
        for _ in range(SAMPLED):
            net(x, Conditions(torch.zeros(batch, device=DEVICE)))

    with bf16():
        for name in ("ddim", "ancestral"):
            config = SamplerConfig(name=name, steps=SAMPLED)
            work = (lambda config=config: generator.sample(ids, None, 0, config), bare)
            in_turn(work, 1, 1)
            costs = [a / b - 1 for a, b in zip(*in_turn(work, repeats, times), strict=True)]
            middle = statistics.median(costs)
            print(f"{name} beside the bare network: median {middle:+.1%} ({min(costs):+.1%} to {max(costs):+.1%})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128 if DEVICE == "cuda" else 8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10 if DEVICE == "cuda" else 1, help="timed together")
    parser.add_argument("--compile", action="store_true", help="also with compiled blocks")
    parser.add_argument("--processor-time", action="store_true", help="where other work shares the machine")
    args = parser.parse_args()
    if args.processor_time:
        global clock
        clock = time.process_time
    where = torch.cuda.get_device_name() + ", bf16" if DEVICE == "cuda" else f"{torch.get_num_threads()} threads, fp32"
    print(f"{where}, torch {torch.__version__}, batch {args.batch}")
    net = train(args.batch, args.repeats, args.steps, args.compile)
    sample(net, args.batch, args.repeats, args.steps)


if __name__ == "__main__":
    main()
