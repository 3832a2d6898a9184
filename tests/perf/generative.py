"""Generative models: a training step of each objective against a bare loop of the same network.

The bare side calls the network on images that are floats already, takes the plainest loss that moves all parameters as
much, and goes backward: no dequantisation that belongs to samples, no metrics. Both update by the same Adam, in turn,
in one process; what is printed is the median over rounds of the ratio ours / bare. The bound is 1.05.

Run: ``python -m tests.perf.generative [NAME...] [--rounds 9] [--threads 1]``
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.core.protocols import Clock, DataFacts, Objective, StepContext
from pipeline.nn.generative import pixels
from pipeline.nn.generative.causal_transformer import CausalTransformer
from pipeline.nn.generative.gaussian import Posterior
from pipeline.nn.generative.pixelcnn import PixelCNN
from pipeline.objectives import autoregressive, flow, vae, vq_vae

IMAGES, SIZE = 32, 32
STEPS = 2
"""Timed together."""
FACTS = DataFacts((SIZE, SIZE), ())
NETWORK: dict[str, Any] = {"channels": 32, "multipliers": (1, 2), "blocks": 1, "groups": 8, "latent": 4}
Bare = Callable[[Any, Tensor], Tensor]
"""The loss of an objective's network for images as float32[B,3,H,W] from -1 to 1."""


def bare_vae(model: vae.VAE, x: Tensor) -> Tensor:
    """Reconstruction by a normal distribution, and the KL divergence."""
    own = Posterior.of(model.model.encode(x))
    decoded = model.model.decode(own.draw(torch.randn_like(own.mean)))
    told = pixels.normal(x, decoded, model.pixels.log_scale.view(-1, 1, 1))
    return (own.kl().flatten(1).sum(dim=1) - told.flatten(1).sum(dim=1)).mean()


def bare_vq_vae(model: vq_vae.VQVAE, x: Tensor) -> Tensor:
    """Reconstruction by a normal distribution, and what the codes cost; codes move with the batch, as in the paper."""
    coded = model.model.encode(x)
    own = model.quantiser(coded)
    model.quantiser.note(coded, own.index)
    model.quantiser.learn(torch.empty(0, 4), 0.99)
    told = pixels.normal(x, model.model.decode(own.z), model.pixels.log_scale.view(-1, 1, 1))
    return (own.losses - told.flatten(1).sum(dim=1)).mean()


def bare_flow(model: flow.Flow, x: Tensor) -> Tensor:
    """Minus the logarithm of the density."""
    return -model.network(x + torch.rand_like(x) / 128).log_density.mean()


def bare_pixelcnn(model: autoregressive.Autoregressive, x: Tensor) -> Tensor:
    """Minus the logarithm of the probability."""
    network, image = model.model, ((x + 1) * 127.5).round().to(torch.uint8)
    assert isinstance(network, PixelCNN)
    return -network.log_likelihood(image, network(image)[0]).mean()


def bare_prior(model: autoregressive.Autoregressive, x: Tensor) -> Tensor:
    """Cross-entropy of the codes of a frozen autoencoder."""
    network, own = model.model, model.autoencoder
    assert isinstance(network, CausalTransformer) and own is not None and own.quantiser is not None
    with torch.no_grad():
        code = own.quantiser(own.model.encode(x)).index.flatten(1)
    return functional.cross_entropy(network(code)[0].flatten(0, 1), code.flatten())


def with_normal_decoder(config: type[Any], **settings: Any) -> Any:
    """Settings of an autoencoder."""
    return config(network=NETWORK, decoder="normal", **settings)


ROWS: Mapping[str, tuple[Callable[[], Objective], Bare]] = {
    "vae": (lambda: vae.VAE(with_normal_decoder(vae.Config), FACTS), bare_vae),
    "vq_vae": (lambda: vq_vae.VQVAE(with_normal_decoder(vq_vae.Config), FACTS), bare_vq_vae),
    "pixelcnn": (
        lambda: autoregressive.Autoregressive(
            autoregressive.Config(network={"filters": 32, "blocks": 1, "dropout": 0.0}), FACTS
        ),
        bare_pixelcnn,
    ),
    "codes": (
        lambda: autoregressive.Autoregressive(
            autoregressive.Config(
                network={"name": "transformer", "dim": 128, "depth": 4, "heads": 4, "dropout": 0.0},
                autoencoder={"kind": "vq_vae", "weights": "random", "network": NETWORK},
            ),
            FACTS,
        ),
        bare_prior,
    ),
    "flow": (
        lambda: flow.Flow(flow.Config(network={"name": "coupling", "levels": 2, "steps": 4, "width": 64}), FACTS),
        bare_flow,
    ),
    "flow, transformer": (
        lambda: flow.Flow(
            flow.Config(network={"name": "transformer", "patch": 4, "dim": 128, "blocks": 4, "layers": 2}), FACTS
        ),
        bare_flow,
    ),
}


def trained(model: nn.Module, loss: Callable[[], Tensor], after: Callable[[], object]) -> Callable[[], None]:
    """A training step."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()
        after()

    return step


def measure(name: str, rounds: int) -> None:
    """Print the ratio of one row."""
    build, bare = ROWS[name]
    ours, theirs = build().train(), build().train()
    image = torch.randint(0, 256, (IMAGES, 3, SIZE, SIZE), dtype=torch.uint8)
    batch = {"image": image, "id": torch.arange(IMAGES), "epoch": torch.zeros(IMAGES, dtype=torch.int64)}
    clock = Clock(1, IMAGES, 10 * IMAGES)
    ctx = StepContext(0, clock)
    sides = (
        trained(ours, lambda: ours(batch, ctx).loss, lambda: ours.after_step(clock)),
        trained(theirs, lambda: bare(theirs, image.float() / 127.5 - 1), lambda: None),
    )
    compare(name, sides, rounds)


def compare(name: str, sides: tuple[Callable[[], object], Callable[[], object]], rounds: int) -> None:
    """Print the median over rounds of the ratio of a step of the first to one of the second, in turn."""
    ratios, seconds = list[float](), list[float]()
    for number in range(rounds + 1):
        taken = []
        for step in sides if number % 2 else sides[::-1]:
            began = time.process_time()
            for _ in range(STEPS):
                step()
            taken.append((time.process_time() - began) / STEPS)
        own, other = taken if number % 2 else taken[::-1]
        if number:  # the first is to warm up
            ratios.append(own / other)
            seconds.append(own)
    middle = statistics.median(ratios)
    print(f"{name}: {statistics.median(seconds):.3f} s a step, {middle:.3f} of the bare loop's, bound 1.05", flush=True)


def measure_asked(doc: str | None, rows: Collection[str], measure: Callable[[str, int], None]) -> None:
    """Measure all rows, or those that the command names."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *rows], help="rows; left out: all")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in args.names or rows:
        measure(name, args.rounds)


if __name__ == "__main__":
    measure_asked(__doc__, ROWS, measure)
