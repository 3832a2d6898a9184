"""CLIP beside open_clip, SimCLR and MAE beside lightly, on real pictures: equal model, batches, steps and evaluation.

Icons of four Debian themes are trained on, a fifth is held out (:mod:`tests.perf.icons`). CLIP learns the icons' names
and is asked for those of the held-out ones; SimCLR and MAE see no labels, and the contexts of held-out icons are read
off their nearest neighbours in training. Each side starts its own model from its own initial weights; batches, crops,
colours, learning rates and what AdamW decays are the same. CPU seconds are those of the process, without the reading.

Run: ``python -m tests.perf.parity_icons [--methods clip simclr mae] [--steps 300] [--seeds 3]``; needs open_clip_torch
and lightly beside what :mod:`tests.perf.icons` names.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms.v2 import RandomHorizontalFlip, RandomResizedCrop

from pipeline.config.schema import EngineConfig, Optimizer
from pipeline.core.protocols import Batch, Clock, DataFacts, Objective, StepContext
from pipeline.dist.group import Place, process_group
from pipeline.engine.accelerate import AccelerateEngine
from pipeline.engine.accumulate import accumulate
from pipeline.objectives import clip, mae, simclr
from tests.perf.icons import CONTEXTS, THEMES, Icons, load

SIZE, BATCH, LENGTH = 32, 128, 12
HELD_OUT = "oxygen"
FACTS = DataFacts((SIZE, SIZE), CONTEXTS)
VIT = {"patch_size": 8, "embed_dim": 96, "depth": 3, "num_heads": 3}
RESNET: dict[str, Any] = {"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 128]}
SETTINGS = Optimizer(lr=1e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)
Loss = Callable[[Batch, StepContext], Tensor]


class Side(NamedTuple):
    """One side's trained model."""

    score: float
    cpu_seconds: float
    loss: float
    """Of the last steps."""


class Task(NamedTuple):
    """What both sides are given."""

    train: Icons
    held: Icons
    tokens: dict[str, tuple[Tensor, int]]
    steps: int
    seed: int
    place: Place


def rate(step: int, steps: int) -> float:
    """Warm-up over a tenth, then a cosine to zero."""
    warm = steps // 10
    if step < warm:
        return SETTINGS.lr * (step + 1) / warm
    return SETTINGS.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def vocabulary(names: list[str]) -> dict[str, int]:
    """A number for each word; 0 pads, 1 is a word that training never saw, 2 ends a text."""
    return {word: number for number, word in enumerate(sorted({w for name in names for w in name.split()}), 3)}


def tokenized(names: list[str], words: dict[str, int]) -> dict[str, tuple[Tensor, int]]:
    """Tokens of each name and their number."""
    found = {}
    for name in set(names):
        row = [*(words.get(word, 1) for word in name.split()[: LENGTH - 1]), 2]
        found[name] = torch.tensor(row + [0] * (LENGTH - len(row))), len(row)
    return found


def batches(task: Task, views: int) -> Iterator[tuple[Batch, StepContext]]:
    """The same for both sides; images as they are, or ``views`` random crops of them."""
    torch.manual_seed(1000 + task.seed)
    crop, flip = RandomResizedCrop(SIZE, scale=(0.3, 1.0), antialias=True), RandomHorizontalFlip()
    order = torch.cat([torch.randperm(len(task.train.names)) for _ in range(task.steps)])
    for step in range(task.steps):
        ids = order[step * BATCH : (step + 1) * BATCH]
        image = task.train.image[ids]
        batch = {"id": ids, "epoch": torch.full_like(ids, step)}
        for number in range(views):
            batch["image" if number == 0 else "image2"] = torch.stack([flip(crop(x)) for x in image])
        if not views:
            texts = [task.tokens[task.train.names[i]] for i in ids.tolist()]
            batch |= {"image": image, "text": torch.stack([t for t, _ in texts])}
            batch["text_length"] = torch.tensor([length for _, length in texts])
        yield batch, StepContext(task.seed, Clock(step, step * BATCH, task.steps * BATCH))


def train_ours(task: Task, objective: Objective, views: int) -> tuple[float, float]:
    """Through the engine, as the loop does; CPU seconds, and the loss of the last steps."""
    plan: Any = SimpleNamespace(global_batch=BATCH, accumulation=1, micro_batch=BATCH, frozen={})
    config = EngineConfig(name="accelerate", precision="fp32", micro_batch=BATCH)
    engine = AccelerateEngine(objective.train(), config, SETTINGS, plan, task.place)
    seconds, losses = 0.0, []
    for batch, ctx in batches(task, views):
        began = time.process_time()
        engine.before_step(ctx.clock)
        for output, _ in accumulate(engine, [batch], ctx):
            losses.append(float(output.loss.detach()))
        engine.update(rate(ctx.clock.step, task.steps))
        engine.after_step(Clock(ctx.clock.step + 1, ctx.clock.samples + BATCH, ctx.clock.total_samples))
        seconds += time.process_time() - began
    return seconds, statistics.mean(losses[-10:])


def train_theirs(task: Task, modules: nn.Module, loss_of: Loss, spared: set[str], views: int) -> tuple[float, float]:
    """A plain loop of torch; ``spared`` are the names that are not decayed."""
    decayed = [p for n, p in modules.named_parameters() if p.requires_grad and n not in spared]
    rest = [p for n, p in modules.named_parameters() if p.requires_grad and n in spared]
    groups = [{"params": decayed, "weight_decay": SETTINGS.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=SETTINGS.lr, betas=SETTINGS.betas, eps=SETTINGS.eps)
    modules.train()
    seconds, losses = 0.0, []
    for batch, ctx in batches(task, views):
        began = time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = rate(ctx.clock.step, task.steps)
        optimizer.zero_grad()
        loss = loss_of(batch, ctx)
        loss.backward()
        optimizer.step()
        if hasattr(modules, "logit_scale"):  # as open_clip_train/train.py
            with torch.no_grad():
                modules.logit_scale.clamp_(0, math.log(100))
        losses.append(float(loss.detach()))
        seconds += time.process_time() - began
    return seconds, statistics.mean(losses[-10:])


def small(modules: nn.Module) -> set[str]:
    """Names of parameters of at most one dimension."""
    return {name for name, p in modules.named_parameters() if p.ndim <= 1}


@torch.no_grad()
def zero_shot(task: Task, image: Callable[[Tensor], Tensor], text: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Part of the held-out icons whose name, known in training, is among the ten nearest of all such names."""
    known = sorted(set(task.train.names) & set(task.held.names))
    rows = [i for i, name in enumerate(task.held.names) if name in set(known)]
    tokens = [task.tokens[name] for name in known]
    names = text(torch.stack([t for t, _ in tokens]), torch.tensor([length for _, length in tokens]))
    features = functional.normalize(image(task.held.image[rows]), dim=1) @ functional.normalize(names, dim=1).T
    wanted = torch.tensor([known.index(task.held.names[i]) for i in rows])
    return float((features.topk(10, dim=1).indices == wanted[:, None]).any(dim=1).float().mean())


@torch.no_grad()
def neighbours(task: Task, encode: Callable[[Tensor], Tensor], k: int = 10) -> float:
    """Part of the held-out icons whose context is that of most of their nearest neighbours in training."""
    bank, query = (
        functional.normalize(torch.cat([encode(part) for part in icons.image.split(256)]), dim=1)
        for icons in (task.train, task.held)
    )
    nearest = (query @ bank.T).topk(k, dim=1).indices
    votes = functional.one_hot(task.train.context[nearest], len(CONTEXTS)).sum(dim=1)
    return float((votes.argmax(dim=1) == task.held.context).float().mean())


def clip_sides(task: Task) -> tuple[Side, Side]:
    """Our CLIP and open_clip's, from the configuration that ours is exported with."""
    from open_clip.loss import ClipLoss
    from open_clip.model import CLIP

    vocab = 3 + max(int(t.max()) for t, _ in task.tokens.values())
    settings = {"dim": 64, "vocab": vocab, "length": LENGTH, "text_width": 96, "text_depth": 2, "text_heads": 3}
    torch.manual_seed(task.seed)
    ours = clip.CLIP(clip.Config(encoder="vit_base_patch32_clip_224", encoder_args=VIT, **settings), FACTS)
    written = {Path(path).suffix: file.content for path, file in ours.exports().items()}
    model = json.loads(str(written[".json"]))["model_cfg"]
    seconds, loss = train_ours(task, ours, views=0)
    ours.eval()
    own = Side(zero_shot(task, ours.image, ours.text), seconds, loss)

    torch.manual_seed(task.seed)
    theirs, criterion, normalize = CLIP(**model), ClipLoss(), ours.image.encoder.normalize

    def loss_of(batch: Batch, ctx: StepContext) -> Tensor:
        image, text, scale = theirs(normalize(batch["image"]), batch["text"])
        return criterion(image, text, scale)

    seconds, loss = train_theirs(task, theirs, loss_of, small(theirs), views=0)
    theirs.eval()
    score = zero_shot(task, lambda x: theirs.encode_image(normalize(x)), lambda t, _: theirs.encode_text(t))
    return own, Side(score, seconds, loss)


def simclr_sides(task: Task) -> tuple[Side, Side]:
    """Our SimCLR, and lightly's loss and head on the same timm network; both are given our colours."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules.heads import SimCLRProjectionHead

    config = simclr.Config(encoder="resnet18", encoder_args=RESNET, dim=64, hidden=128)
    torch.manual_seed(task.seed)
    ours = simclr.SimCLR(config, FACTS)
    seconds, loss = train_ours(task, ours, views=2)
    own = Side(neighbours(task, ours.eval().encoder), seconds, loss)

    torch.manual_seed(task.seed)
    network = timm.create_model("resnet18", num_classes=0, **RESNET)
    theirs = nn.ModuleDict({"backbone": network, "head": SimCLRProjectionHead(128, 128, 64)})
    criterion, normalize = NTXentLoss(temperature=config.temperature), ours.encoder.normalize

    def loss_of(batch: Batch, ctx: StepContext) -> Tensor:
        first, second = (
            theirs["head"](theirs["backbone"](normalize(view))) for view in ours.views(batch, ctx).chunk(2)
        )
        return criterion(first, second)

    seconds, loss = train_theirs(task, theirs, loss_of, small(theirs), views=2)
    network.eval()
    return own, Side(neighbours(task, lambda x: network(normalize(x))), seconds, loss)


def mae_sides(task: Task) -> tuple[Side, Side]:
    """Our MAE and lightly's; targets are patches, each by its own mean and variance."""
    from lightly.models import utils
    from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM

    args = VIT | {"patch_size": 4}
    sizes = {"decoder_dim": 64, "decoder_depth": 1, "decoder_heads": 4}
    config = mae.Config(encoder="vit_tiny_patch16_224", encoder_args=args, **sizes)
    torch.manual_seed(task.seed)
    ours = mae.MAE(config, FACTS)
    seconds, loss = train_ours(task, ours, views=1)
    own = Side(neighbours(task, ours.eval().encoders()["image"]), seconds, loss)

    torch.manual_seed(task.seed)
    vit: Any = timm.create_model("vit_tiny_patch16_224", img_size=SIZE, num_classes=0, **args)
    backbone: Any = MaskedVisionTransformerTIMM(vit=vit)
    decoder = MAEDecoderTIMM(
        num_patches=vit.patch_embed.num_patches,
        patch_size=4,
        embed_dim=VIT["embed_dim"],
        decoder_embed_dim=64,
        decoder_depth=1,
        decoder_num_heads=4,
    )
    theirs = nn.ModuleDict({"backbone": backbone, "decoder": decoder})
    length, normalize = backbone.sequence_length, ours.normalize

    def loss_of(batch: Batch, ctx: StepContext) -> Tensor:
        image = normalize(batch["image"])
        keep, hidden = utils.random_token_mask(size=(len(image), length), mask_ratio=0.75, device=image.device)
        decoded = decoder.embed(backbone.encode(images=image, idx_keep=keep))
        masked = utils.repeat_token(decoder.mask_token, (len(image), length))
        masked = utils.set_at_index(masked, keep, decoded.type_as(masked))
        predicted = decoder.predict(utils.get_at_index(decoder.decode(masked), hidden))
        target = utils.get_at_index(utils.patchify(image, 4), hidden - 1)
        return functional.mse_loss(predicted, utils.normalize_mean_var(target))

    seconds, loss = train_theirs(task, theirs, loss_of, small(theirs), views=1)
    theirs.eval()
    return own, Side(neighbours(task, lambda x: backbone(normalize(x))), seconds, loss)


SIDES = {"clip": (clip_sides, "open_clip"), "simclr": (simclr_sides, "lightly"), "mae": (mae_sides, "lightly")}


def compared(method: str, pairs: list[tuple[Side, Side]], steps: int) -> str:
    """A row of the record: scores of all seeds, their difference with its error, and images per CPU second."""
    differences = [100 * (own.score - other.score) for own, other in pairs]
    error = statistics.stdev(differences) / math.sqrt(len(pairs)) if len(pairs) > 1 else math.nan
    scores = [" ".join(f"{100 * pair[side].score:.1f}" for pair in pairs) for side in (0, 1)]
    ratio = statistics.median(other.cpu_seconds / own.cpu_seconds for own, other in pairs)
    speed = statistics.median(steps * BATCH / own.cpu_seconds for own, _ in pairs)
    mean = statistics.mean(differences)
    row = [method, SIDES[method][1], *scores, f"{mean:+.1f} +- {error:.1f}", f"{speed:.0f}", f"{ratio:.2f}"]
    return f"| {' | '.join(row)} |"


def main() -> None:
    """Train all pairs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=Path("/tmp/sluice-icons"))
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # the peers' imports
    train = load([theme for theme in THEMES if theme != HELD_OUT], SIZE, args.cache)
    held = load([HELD_OUT], SIZE, args.cache)
    tokens = tokenized(train.names + held.names, vocabulary(train.names))
    common = len(set(train.names) & set(held.names))
    print(f"{len(train.names)} icons to train on, {len(held.names)} of {HELD_OUT} held out, {common} names in common")
    print("| method | peer | ours, % | peer's, % | difference | images per CPU second | times the peer's |")
    print("|---|---|---|---|---|---|---|")
    with process_group(5) as place:
        for method in args.methods:
            sides = SIDES[method][0]
            pairs = [sides(Task(train, held, tokens, args.steps, seed, place)) for seed in range(args.seeds)]
            print(compared(method, pairs, args.steps), flush=True)
            print("  losses:", [(round(a.loss, 3), round(b.loss, 3)) for a, b in pairs], flush=True)


if __name__ == "__main__":
    main()
