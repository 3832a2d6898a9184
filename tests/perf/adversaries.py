"""Adversaries and energies: a training step of each objective against a bare loop of the same networks.

A step of `gan` is an update of the critic and one of the generator (SNGAN's networks at a quarter of the width, hinge
loss); with R1, also the critic's second derivative. A step of `energy` is one update by denoising score matching. The
bare side calls the same modules on images that are floats already, with noise of torch's generator and no metrics; its
spectral norms are torch's, which move at each forward. Both sides take turns in one process; what is printed is the
median over rounds of the ratio ours / bare, of processor time. The bound is 1.05.

Run: ``python -m tests.perf.adversaries [NAME...] [--rounds 9] [--threads 1]``
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import relu
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

from pipeline.core.protocols import Clock, DataFacts, StepContext
from pipeline.objectives import energy, gan
from tests.perf.generative import compare, measure_asked

IMAGES, SIZE = 32, 32
FACTS = DataFacts((SIZE, SIZE), ())
CLOCK = Clock(1, IMAGES, 10 * IMAGES)
CTX = StepContext(0, CLOCK)
GAN = {"generator": {"widths": [64, 64, 64, 64]}, "critic": {"name": "resnet", "widths": [32, 32, 32, 32]}}
R1 = GAN | {"penalty": {"kind": "r1"}}
ENERGY = {"network": {"channels": 32, "multipliers": [1, 2], "blocks": 1, "attention": [16]}}
Step = Callable[[], object]


def adam(module: nn.Module) -> torch.optim.Adam:
    """As both sides have it."""
    return torch.optim.Adam(module.parameters(), lr=1e-4, betas=(0.0, 0.9), fused=True)


def updated(optimizer: torch.optim.Optimizer, module: nn.Module, loss: Tensor) -> None:
    """Of the parameters of ``module`` alone."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient
    optimizer.step()


def gan_sides(settings: dict[str, object], image: Tensor) -> tuple[Step, Step]:
    """Ours and the bare one."""
    ours, theirs = (gan.GAN(gan.Config(**settings), FACTS).train() for _ in range(2))  # pyright: ignore[reportArgumentType]
    for layer in [m for m in theirs.critic.modules() if parametrize.is_parametrized(m)]:
        parametrize.remove_parametrizations(layer, "weight")
        spectral_norm(layer)
    batch = {"image": image, "id": torch.arange(IMAGES), "epoch": torch.zeros(IMAGES, dtype=torch.int64)}
    real = image.float() / 127.5 - 1
    optimizers = {model: (adam(model.critic), adam(model.generator)) for model in (ours, theirs)}

    def own() -> None:
        for phase, optimizer in zip(("critic", "generator"), optimizers[ours], strict=True):
            updated(optimizer, getattr(ours, phase), ours(batch, replace(CTX, phase=phase)).loss)
        ours.after_step(CLOCK)

    def bare() -> None:
        with torch.no_grad():
            fake = theirs.generator(torch.randn(IMAGES, 128), None)
        loss = relu(1 - theirs.critic(real).scores).mean() + relu(1 + theirs.critic(fake).scores).mean()
        if "penalty" in settings:
            x = real.clone().requires_grad_()
            (slope,) = torch.autograd.grad(theirs.critic(x).scores.sum(), x, create_graph=True)
            loss = loss + 5 * slope.square().flatten(1).sum(dim=1).mean()
        updated(optimizers[theirs][0], theirs.critic, loss)
        score = theirs.critic(theirs.generator(torch.randn(IMAGES, 128), None)).scores
        updated(optimizers[theirs][1], theirs.generator, -score.mean())

    return own, bare


def energy_sides(image: Tensor) -> tuple[Step, Step]:
    """Ours and the bare one."""
    ours, theirs = (energy.EnergyModel(energy.Config(**ENERGY), FACTS).train() for _ in range(2))  # pyright: ignore[reportArgumentType]
    batch = {"image": image, "id": torch.arange(IMAGES), "epoch": torch.zeros(IMAGES, dtype=torch.int64)}
    clean = image.float() / 127.5 - 1
    optimizers = adam(ours), adam(theirs)

    def own() -> None:
        updated(optimizers[0], ours, ours(batch, CTX).loss)

    def bare() -> None:
        sigma = theirs.sigmas[torch.randint(0, len(theirs.sigmas), (IMAGES,))]
        noise, size = torch.randn_like(clean), sigma.float().view(-1, 1, 1, 1)
        x = (clean + size * noise).requires_grad_()
        (slope,) = torch.autograd.grad(theirs.energy(x, sigma).sum(), x, create_graph=True)
        updated(optimizers[1], theirs, (noise - size * slope).square().mean())

    return own, bare


ROWS = {
    "gan": lambda image: gan_sides(GAN, image),
    "gan with R1": lambda image: gan_sides(R1, image),
    "energy": energy_sides,
}


def measure(name: str, rounds: int) -> None:
    """Print the ratio of one row."""
    compare(name, ROWS[name](torch.randint(0, 256, (IMAGES, 3, SIZE, SIZE), dtype=torch.uint8)), rounds)


if __name__ == "__main__":
    measure_asked(__doc__, ROWS, measure)
