"""The tiled losses against open_clip's own, value and gradients; and what open_clip makes of an exported model."""

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.config.load import load_run
from pipeline.config.schema import Captions, Optimizer
from pipeline.core.evaluation import EvalContext
from pipeline.core.protocols import DataFacts
from pipeline.data.clip_vocabulary import clip_tokenizer
from pipeline.data.text import TextDecoder
from pipeline.dist.group import process_group
from pipeline.engine.optimizers import rules
from pipeline.evals.zero_shot import Config as ZeroShotConfig
from pipeline.evals.zero_shot import ZeroShot
from pipeline.nn.contrastive import info_nce, sigmoid_loss
from pipeline.nn.distillation.affinity import affinity
from pipeline.nn.open_clip import CLIP_END
from pipeline.objectives.clip import CLIP, Config
from pipeline.run.export import write
from tests.ranks import start_ranks

pytest.importorskip("open_clip", reason="needs the extra 'parity'")
CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = {"dim": 12, "vocab": 40, "length": 9, "text_width": 16, "text_depth": 2, "text_heads": 4}
VIT = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
TOWERS = {
    "class token": {"encoder_args": VIT},
    "mean and sigmoid": {"encoder_args": VIT | {"global_pool": "avg", "drop_path_rate": 0.1}, "loss": "sigmoid"},
    "norm before": {"encoder": "vit_base_patch32_clip_224", "encoder_args": VIT | {"mlp_ratio": 2.0}},
    "timm by name": {"encoder": "resnet10t", "encoder_args": {"drop_rate": 0.1}},
    "by name, at its size": {"encoder": "test_vit", "size": 160},
    "timm at its size": {"encoder": "test_vit2", "size": 160},
}


def stirred(size: int = 32, **settings: Any) -> CLIP:
    """A model none of whose weights is zero or one."""
    torch.manual_seed(0)
    defaults = {"encoder": "vit_tiny_patch16_224", **SMALL}
    model = CLIP(Config(**defaults | settings), DataFacts((size, size), ())).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    return model


@pytest.mark.filterwarnings("ignore")  # open_clip's imports
def test_affinities_are_followed_as_its_distillation_does():
    from open_clip.loss import DistillClipLoss

    image, text, its_image, its_text = (
        functional.normalize(torch.randn(6, d, generator=torch.Generator().manual_seed(s)))
        for s, d in enumerate((5, 5, 3, 3))
    )
    scales = torch.tensor([14.0]), 50.0
    ours, theirs = ([x.clone().requires_grad_() for x in (image, text, scales[0])] for _ in range(2))
    found = affinity(*ours, its_image, its_text, scales[1]).mean()
    found.backward()
    _, expected = DistillClipLoss()(*theirs, its_image, its_text, scales[1])
    expected.backward()
    torch.testing.assert_close(found, expected)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # open_clip's imports
@pytest.mark.parametrize("tower", TOWERS)
def test_an_exported_model_is_loaded_strictly_and_gives_the_same_features(tower, tmp_path: Path):
    import open_clip

    model = stirred(**TOWERS[tower])
    for name, file in model.exports().items():
        assert file.content is not None, file.note
        write(tmp_path / name, file)
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'open_clip'}", require_pretrained=True).eval()

    image = torch.randint(0, 256, (3, 3, *model.image_size), dtype=torch.uint8)
    text, length = torch.randint(3, 40, (3, 9)), torch.tensor([9, 2, 5])
    text[torch.arange(9) >= length[:, None]] = 0
    text.scatter_(1, length[:, None] - 1, 2)
    mean, std = open_clip.get_model_preprocess_cfg(theirs)["mean"], open_clip.get_model_preprocess_cfg(theirs)["std"]
    normal = (image / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        pairs = [
            (theirs.encode_image(normal), model.encoders()["image"](image)),
            (theirs.encode_text(text), model.encoders()["text"](text, length)),
            (theirs.logit_scale.exp(), model.shared()["scale"][0]),
        ]
        if model.bias is not None:
            pairs.append((theirs.logit_bias, model.bias[0]))
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # open_clip's imports
@pytest.mark.parametrize(
    ("recipe", "name"), [("clip_b32_datacomp_small", "ViT-B-32"), ("clip_b16_datacomp_large", "ViT-B-16")]
)
def test_recipes_train_the_published_towers(recipe, name):
    """Names and shapes of open_clip's model, in its own layout; so are epsilons, pooling and the norm before."""
    from open_clip import get_model_config
    from open_clip.model import CLIP as Theirs

    settings = load_run(CONFIGS / "pretrain" / f"{recipe}.toml").objective.settings
    with torch.device("meta"):
        model = CLIP(Config(**settings), DataFacts((224, 224), ()))
        theirs = Theirs(**get_model_config(name))
        written = {Path(path).suffix: file.content for path, file in model.exports().items()}
        rebuilt = Theirs(**json.loads(written[".json"])["model_cfg"])
    shapes = {n: p.shape for n, p in theirs.named_parameters()}
    assert {n: p.shape for n, p in written[".safetensors"].items()} == shapes

    for made in (rebuilt, theirs):
        assert made.visual.pool_type == "tok" and not made.visual.final_ln_after_pool
    assert str(rebuilt.visual) == str(theirs.visual)


@pytest.mark.filterwarnings("ignore")  # open_clip's imports
@pytest.mark.parametrize("encoder", ["vit_base_patch32_clip_224", "vit_tiny_patch16_224"])
def test_weights_start_and_are_decayed_as_open_clips(encoder):
    """Deviations within sampling error; constants are equal; as many numbers are decayed by its trainer's rule."""
    from open_clip.model import CLIP as Theirs

    torch.manual_seed(0)
    width = {"text_width": 64, "dim": 48, "vocab": 300, "length": 40}
    settings = SMALL | width | {"encoder": encoder, "encoder_args": VIT | {"embed_dim": 96}}
    model = CLIP(Config(**settings), DataFacts((48, 48), ()))
    written = {Path(path).suffix: file.content for path, file in model.exports().items()}
    theirs = Theirs(**json.loads(written[".json"])["model_cfg"])
    assert written[".safetensors"].keys() == dict(theirs.named_parameters()).keys()
    for name, other in theirs.named_parameters():
        own = written[".safetensors"][name].detach()
        if not other.std(correction=0):
            assert torch.equal(own, other), name
            continue
        expected, found = (float(x.detach().double().square().mean().sqrt()) for x in (other, own))
        assert abs(found / expected - 1) < 5 * own.numel() ** -0.5, name
        largest = float(own.abs().max() / other.detach().abs().max())  # uniform or normal
        assert 0.7 < largest < 1.4, name

    def excluded(name, p):  # open_clip_train/main.py
        return p.ndim < 2 or "bn" in name or "ln" in name or "bias" in name or "logit_scale" in name

    rule = rules(model, Optimizer(lr=1.0, weight_decay=0.2))
    own = sum(p.numel() for name, p in model.named_parameters() if rule[name].weight_decay)
    assert own == sum(p.numel() for name, p in theirs.named_parameters() if not excluded(name, p))


@pytest.mark.filterwarnings("ignore")  # open_clip's imports
def test_classes_have_the_vectors_of_open_clips_zero_shot_classifier(tmp_path: Path):
    """Equal weights, equal tokens; sixty templates, and names with several words."""
    import open_clip

    model = stirred(**TOWERS["class token"])
    for name, file in model.exports().items():
        assert file.content is not None, file.note
        write(tmp_path / name, file)
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'open_clip'}", require_pretrained=True).eval()
    templates = tuple(f"{'a ' * (i % 4)}photo {i} of {{}}." for i in range(60))
    names = ("a cat", "dog", "traffic light", "dog")

    def rows(texts: list[str]) -> tuple[Tensor, Tensor]:
        """Tokens that depend on the text, as long as it has words, and its end."""
        text, length = torch.zeros(len(texts), 9, dtype=torch.int64), torch.empty(len(texts), dtype=torch.int64)
        for i, words in enumerate(t.split()[:8] for t in texts):
            text[i, : len(words)] = torch.tensor([3 + sum(map(ord, word)) % 37 for word in words])
            text[i, len(words)], length[i] = 2, len(words) + 1
        return text, length

    ctx = SimpleNamespace(
        tokens=lambda texts: dict(zip(("text", "text_length"), rows(texts), strict=True)),
        encoders=model.encoders(),
        place=SimpleNamespace(device=torch.device("cpu")),
    )
    evaluation = ZeroShot(ZeroShotConfig(templates=templates))
    with torch.no_grad():
        own = evaluation.class_vectors(cast("EvalContext", ctx), evaluation.called(names))
        expected = open_clip.build_zero_shot_classifier(
            theirs, lambda texts: rows(texts)[0], names, [t.format for t in templates], num_classes_per_batch=2
        ).T
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)
    assert float((own[1] - own[0]).norm()) > 1e-3


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"encoder_args": VIT | {"class_token": False, "global_pool": "avg"}}, "one class token"),
        ({"encoder_args": VIT | {"init_values": 1e-5}}, "no blocks.0.ls1.gamma"),
        ({"encoder_args": VIT | {"qk_norm": True}}, "no blocks.0.attn.k_norm"),
        ({"encoder": "resnet18", "encoder_args": {"layers": [1, 1, 1, 1]}}, "a ResNet is another architecture"),
        ({"encoder_args": VIT, "text_pool": "mean"}, "no mean over tokens"),
        ({"encoder_args": VIT, "mean": [0.5], "std": [0.5]}, "3 channels"),
    ],
)
def test_what_open_clip_cannot_hold_is_refused_with_the_reason(settings, reason):
    (offered,) = stirred(**settings).exports().values()
    assert offered.content is None and reason in offered.note


def both_sides(kind: str, scale: float, rank: int, world: int) -> list[list[Tensor]]:
    """Ours and theirs on a rank's 12 of the global batch: loss, and gradients of what it is made of."""
    from open_clip.loss import ClipLoss, SigLipLoss

    draw = torch.randn(2, 12 * world, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    results = []
    for ours in (True, False):
        image, text = (functional.normalize(x, dim=1).chunk(world)[rank].clone().requires_grad_() for x in draw)
        s = torch.tensor([scale], dtype=torch.float64, requires_grad=True)
        b = torch.tensor([-10.0], dtype=torch.float64, requires_grad=True)
        leaves = [image, text, s] if kind == "softmax" else [image, text, s, b]
        if ours:
            loss = {"softmax": info_nce, "sigmoid": sigmoid_loss}[kind](*leaves, tile=8)
        elif kind == "softmax":
            loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)(*leaves)
        else:
            loss = SigLipLoss(rank=rank, world_size=world)(*leaves)
        results.append([loss.detach().squeeze(), *torch.autograd.grad(loss, leaves)])
    return results


KINDS = [(kind, scale) for kind in ("softmax", "sigmoid") for scale in (1.0, 14.3, 100.0)]


def on_a_rank() -> list[list[list[np.ndarray]]]:
    warnings.simplefilter("ignore")  # open_clip's imports, and collectives that torch calls old
    with process_group(1.0) as place:
        found = [both_sides(*case, place.rank, place.world_size) for case in KINDS]
    return [[[t.numpy() for t in side] for side in sides] for sides in found]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_value_and_gradients_are_open_clips(world):
    """Features' gradients on each rank, of temperature and bias what an engine makes of them: the mean over ranks."""
    ended = start_ranks(world, on_a_rank)
    assert [e.problem for e in ended] == [None] * world
    for number, case in enumerate(KINDS):
        own, theirs = (
            [list(rank) for rank in zip(*(e.value[number][side] for e in ended), strict=True)] for side in (0, 1)
        )
        for name, a, b in zip(("loss", "image", "text", "scale", "bias"), own, theirs, strict=False):
            if name not in ("image", "text"):
                a, b = np.mean(a, axis=0), np.mean(b, axis=0)
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12, err_msg=f"{name} of {case} at {world} ranks")


@pytest.mark.filterwarnings("ignore")  # open_clip's imports
def test_clips_vocabulary_gives_open_clips_tokens():
    from open_clip.tokenizer import SimpleTokenizer

    length = 12
    captions = Captions(tokenizer="clip", pad="!", length=length)
    ours = TextDecoder(captions, clip_tokenizer(), 0)
    texts = [
        "a photo of a cat.",
        " A Bold\t Italic  SERIF!",
        "it's 2024, isn't it?! we'll see",
        "na\u00efve \u65e5\u672c \U0001f408",
    ]
    texts.append("a text that is far longer than its twelve tokens of room allow, so that it is cut")
    theirs = SimpleTokenizer(context_length=length)(texts)
    for text, expected in zip(texts, theirs, strict=True):
        row, size, _ = ours.decode(memoryview(text.encode()))
        assert row.tolist() == expected.tolist() and row[size - 1] == CLIP_END, text
    batch = {"text": theirs[:1], "text_length": torch.tensor([7])}
    assert ours.words(batch) == ["a photo of a cat ."]
