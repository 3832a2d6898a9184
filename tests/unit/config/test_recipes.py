"""Every recipe against the settings of its paper: optimizer, schedule, length, batch, averages and crops, all by name.

Each table holds every field of ``[optimizer]`` and ``[schedule]``, so that a default cannot slip into what is called
published. Settings of objectives are those that papers vary, defaults included.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config.load import load_run
from pipeline.core import registry
from pipeline.core.components import OBJECTIVES
from tests.unit.config.clustering_recipes import CLUSTERING

CONFIGS = Path(__file__).parents[3] / "configs"
STEADY = {"weight_decay_end": None, "lr_vectors": 1.0}
ADAMW = {"name": "adamw", "lr_scaling": "none", "eps": 1e-8, "layer_decay": 1.0, "clip": None, "decay": "matrices"}
ADAMW |= STEADY
LARS = STEADY | {
    "name": "lars",
    "decay": "matrices",
    "momentum": 0.9,
    "lr_scaling": "linear",
    "lr_batch": 256,
    "layer_decay": 1.0,
    "clip": None,
}
SGD = {"name": "sgd", "lr_scaling": "none", "momentum": 0.9, "layer_decay": 1.0, "clip": None, "decay": "matrices"}
SGD |= STEADY

# He et al. 2022, appendix A.1, tables 8 to 10, and the authors' PRETRAIN.md and FINETUNE.md (facebookresearch/mae).
MAE = {
    "run.global_batch": 4096,
    "optimizer": ADAMW
    | {"lr": 1.5e-4, "lr_scaling": "linear", "lr_batch": 256, "betas": [0.9, 0.95], "weight_decay": 0.05},
    "schedule": {"name": "cosine", "warmup": "40ep", "final": 0.0},
    "data.image.scale": [0.2, 1.0],
    "data.image.flip": True,
    "objective.mask_ratio": 0.75,
    "objective.norm_pix": True,
}


def mae_finetuning(lr: float, layer_decay: float, length: str, drop_path: float) -> dict[str, Any]:
    optimizer = {"lr_scaling": "linear", "lr_batch": 256, "betas": [0.9, 0.999], "weight_decay": 0.05}
    return {
        "run.global_batch": 1024,
        "run.length": length,
        "optimizer": ADAMW | optimizer | {"lr": lr, "layer_decay": layer_decay},
        "schedule": {"name": "cosine", "warmup": "5ep", "final": pytest.approx(1e-6 / (lr * 4), rel=0.01)},
        "data.image.scale": [0.08, 1.0],
        "objective.label_smoothing": 0.1,
        "objective.head_std": 2e-5,
        "objective.antialias": False,  # util/pos_embed.py
        "objective.mixing": {"mixup": 0.8, "cutmix": 1.0, "erase": 0.25},
        "objective.encoder_args.drop_path_rate": drop_path,
    }


def mae_probe(length: str) -> dict[str, Any]:
    return {
        "run.global_batch": 16384,
        "run.length": length,
        "optimizer": LARS | {"lr": 0.1, "weight_decay": 0.0},
        "schedule": {"name": "cosine", "warmup": "10ep", "final": 0.0},
        "data.image.scale": [0.08, 1.0],
        "objective.freeze": True,
        "objective.antialias": False,
    }


# Chen et al. 2020, section 2.2 and appendix B.9, and google-research/simclr, whose loss is the sum of both directions.
SIMCLR = {
    "run.global_batch": 4096,
    "optimizer": LARS | {"lr": 0.3, "weight_decay": 1e-6},
    "schedule": {"name": "cosine", "warmup": "10ep", "final": 0.0},
    "data.image.scale": [0.08, 1.0],
    "objective.temperature": 0.1,
    "objective.loss": "sum",
}
# Gadre et al. 2023 (DataComp), table 6 and the repository's scale_configs.py.
CLIP = {
    "optimizer": ADAMW | {"lr": 5e-4, "betas": [0.9, 0.98], "eps": 1e-6, "weight_decay": 0.2},
    "schedule": {"name": "cosine", "warmup": "500ba", "final": 0.0},
    "data.image.scale": [0.9, 1.0],
    "data.image.flip": False,
    "objective.encoder_args": {},
}
B32 = {"objective.encoder": "vit_base_patch32_clip_224"}
DIFFUSION = {"betas": [0.9, 0.999], "weight_decay": 0.0}
STEP = {"name": "step", "factor": 0.1, "cooldown": "0%"}
MMSELFSUP = STEP | {"warmup": "5ep", "milestones": pytest.approx([30 / 70, 50 / 70], abs=1e-6)}
CONSTANT = {"name": "constant", "warmup": "0%", "cooldown": "0%"}
# Grill et al. 2020, section 3.3, and google-deepmind/deepmind-research, byol/configs/byol.py.
BYOL = {
    "run.global_batch": 4096,
    "schedule": {"name": "cosine", "warmup": "10ep", "final": 0.0},
    "data.image.scale": [0.08, 1.0],
    "objective.hidden": 4096,
    "objective.dim": 256,
}
BLURRED = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "jitter": 0.8, "grey": 0.2} | {
    "blur": 1.0,
    "solarize": 0.0,
    "sigma": [0.1, 2.0],
}
SOLARISED = BLURRED | {"blur": 0.1, "solarize": 0.2}
# facebookresearch/barlowtwins and /vicreg, the defaults of their main.py and the README's commands.
REDUNDANCY = {
    "run.global_batch": 2048,
    "run.length": "1000ep",
    "optimizer": LARS | {"lr": 0.2, "weight_decay": 1e-6},
    "schedule": {"name": "cosine", "warmup": "10ep", "final": 0.001},
    "data.image.scale": [0.08, 1.0],
    "objective.hidden": 8192,
    "objective.dim": 8192,
    "objective.colour": BLURRED,
    "objective.colour2": SOLARISED,
}
CIFAR = {
    "run.length": "200ep",
    "run.global_batch": 128,
    "schedule": {"name": "cosine", "warmup": "0%", "final": 0.0},
    "data.image.scale": [0.08, 1.0],
    "objective.colour": BLURRED | {"blur": 0.0},
    "objective.colour2": BLURRED | {"blur": 0.0, "solarize": 0.2},
}
# facebookresearch/dino and bytedance/ibot: the defaults of their main files and the READMEs' commands.
DECAYING = {"weight_decay": 0.04, "weight_decay_end": 0.4, "betas": [0.9, 0.999]}


def dino(length: str, batch: int, **settings: Any) -> dict[str, Any]:
    return {
        "run.length": length,
        "run.global_batch": batch,
        "optimizer": ADAMW | DECAYING | {"lr": 5e-4, "lr_scaling": "linear", "lr_batch": 256, "clip": 3.0},
        "groups": [{"prefix": "head.last", "frozen_until": "1ep"}],
        "schedule": {"name": "cosine", "warmup": "10ep", "final": pytest.approx(1e-6 / (5e-4 * batch / 256))},
        "objective.encoder_args": {"drop_path_rate": 0.1},
        "objective.momentum": 0.996,
        "objective.temperature": 0.1,
        "objective.teacher_temperature_start": 0.04,
        "objective.centre_momentum": 0.9,
        "objective.hidden": 2048,
        "objective.bottleneck": 256,
        "objective.colour": BLURRED,
        "objective.colour2": SOLARISED,
        "objective.colour_small": BLURRED | {"blur": 0.5},
    } | {f"objective.{name}": value for name, value in settings.items()}


PUBLISHED: dict[str, dict[str, Any]] = {
    **CLUSTERING,
    "pretrain/byol_rn50_300": BYOL
    | {
        "run.length": "300ep",
        "optimizer": LARS | {"lr": 0.3, "weight_decay": 1e-6},
        "objective.momentum": 0.99,
    },
    "pretrain/byol_rn50_1000": BYOL
    | {
        "run.length": "1000ep",
        "optimizer": LARS | {"lr": 0.2, "weight_decay": 1.5e-6},
        "objective.momentum": 0.996,
    },
    "pretrain/barlow_twins_rn50_1000": REDUNDANCY
    | {
        "optimizer": LARS | {"lr": 0.2, "weight_decay": 1e-6, "lr_vectors": pytest.approx(0.0048 / 0.2)},
        "objective.redundancy": 0.0051,
    },
    "pretrain/vicreg_rn50_1000": REDUNDANCY
    | {"objective.invariance": 25.0, "objective.variance": 25.0, "objective.covariance": 1.0},
    # lightly, cifar10_benchmark.py; its loss of BYOL is a quarter of the paper's.
    "pretrain/byol_rn18_cifar10": CIFAR
    | {"optimizer": SGD | {"lr": 0.06 / 4, "weight_decay": 4 * 5e-4, "decay": "all"}, "objective.momentum": 0.99},
    "pretrain/barlow_twins_rn18_cifar10": CIFAR
    | {
        "optimizer": SGD | {"lr": 0.06, "weight_decay": 5e-4, "decay": "all"},
        "objective.redundancy": 5e-3,
        "objective.layers": 2,
    },
    "pretrain/dino_vit_s_100": dino("100ep", 512, teacher_temperature=0.04, prototypes=65536, fixed_lengths=True),
    "pretrain/dino_vit_s_300": dino("300ep", 1024, teacher_temperature=0.07, prototypes=65536, fixed_lengths=False)
    | {"objective.teacher_warmup": "30ep"},
    "pretrain/ibot_vit_s_800": dino("800ep", 1024, teacher_temperature=0.07, prototypes=8192, fixed_lengths=False)
    | {"objective.teacher_warmup": "30ep", "objective.masked.teacher_temperature": 0.07}
    | {"objective.masked.ratio": [0.1, 0.5], "objective.masked.views": 0.5, "objective.masked.shape": "block"},
    # facebookresearch/ijepa, configs/in1k_vith14_ep300.yaml.
    "pretrain/ijepa_vit_h_300": {
        "run.length": "300ep",
        "run.global_batch": 2048,
        "optimizer": ADAMW | DECAYING | {"lr": 1e-3},
        "schedule": {"name": "cosine", "warmup": "40ep", "final": 0.001},
        "data.image.scale": [0.3, 1.0],
        "data.image.flip": False,
        "objective.targets": 4,
        "objective.target_scale": [0.15, 0.2],
        "objective.target_ratio": [0.75, 1.5],
        "objective.context_scale": [0.85, 1.0],
        "objective.predictor_dim": 384,
        "objective.predictor_depth": 12,
        "objective.momentum": 0.996,
    },
    **{
        f"pretrain/mae_vit_{size}_{epochs}": MAE | {"run.length": f"{epochs}ep"}
        for size in "blh"
        for epochs in (800, 1600)
    },
    # The rates are ours, by the same rule, for a smaller set.
    "pretrain/mae_vit_s_imagenette": MAE
    | {"run.global_batch": 256, "run.length": "200ep", "schedule": MAE["schedule"] | {"warmup": "20ep"}},
    "finetune/mae_vit_b": mae_finetuning(5e-4, 0.65, "100ep", 0.1),
    "finetune/mae_vit_l": mae_finetuning(1e-3, 0.75, "50ep", 0.2),
    "finetune/mae_vit_h": mae_finetuning(1e-3, 0.75, "50ep", 0.3),
    "finetune/mae_vit_b_linear": mae_probe("90ep"),
    "finetune/mae_vit_l_linear": mae_probe("50ep"),
    "finetune/mae_vit_h_linear": mae_probe("50ep"),
    "pretrain/simclr_rn50_100": SIMCLR | {"run.length": "100ep"},
    "pretrain/simclr_rn50_1000": SIMCLR | {"run.length": "1000ep"},
    "pretrain/simclr_rn18_cifar10": SIMCLR
    | {
        "run.length": "1000ep",
        "run.global_batch": 512,
        "optimizer": LARS | {"lr": 1.0, "lr_scaling": "none", "weight_decay": 1e-4},
        "objective.temperature": 0.5,
    },
    # Chen et al. 2020 (arXiv 2003.04297) and facebookresearch/moco, README.
    "pretrain/moco_v2_rn50": {
        "run.length": "200ep",
        "run.global_batch": 256,
        "optimizer": SGD | {"lr": 0.03, "weight_decay": 1e-4, "decay": "all"},
        "schedule": {"name": "cosine", "warmup": "0ep", "final": 0.0},
        "data.image.scale": [0.2, 1.0],
        "objective.temperature": 0.2,
    },
    # Chen, Xie and He 2021, section 5, and facebookresearch/moco-v3, CONFIG.md.
    "pretrain/moco_v3_vit_b": {
        "run.length": "300ep",
        "run.global_batch": 4096,
        "optimizer": ADAMW
        | {
            "lr": 1.5e-4,
            "lr_scaling": "linear",
            "lr_batch": 256,
            "betas": [0.9, 0.999],
            "weight_decay": 0.1,
            "decay": "all",
        },
        "schedule": {"name": "cosine", "warmup": "40ep", "final": 0.0},
        "data.image.scale": [0.08, 1.0],
        "objective.temperature": 0.2,
        "objective.momentum": 0.99,
        "objective.freeze_patches": True,
    },
    # Gidaris et al. 2018 and Doersch et al. 2015 as open-mmlab/mmselfsup reproduced them with a ResNet-50.
    "pretrain/rotation_rn50": {
        "run.length": "70ep",
        "run.global_batch": 128,
        "optimizer": SGD | {"lr": 0.2, "weight_decay": 1e-4},
        "schedule": MMSELFSUP,
        "data.image.scale": [0.08, 1.0],
    },
    "pretrain/relative_patch_rn50": {
        "run.length": "70ep",
        "run.global_batch": 512,
        "optimizer": SGD | {"lr": 0.2, "weight_decay": 1e-4},
        "schedule": MMSELFSUP,
        "data.image.size": 255,
        "objective.tiles.size": 64,
        "objective.tiles.jitter": 21,
        "objective.tiles.grey": 0.66,
        "objective.hidden": 4096,
        "objective.head_norm": True,
    },
    # gidariss/FeatureLearningRotNet, config/CIFAR10_RotNet_NIN4blocks.py.
    "pretrain/rotation_rn18_cifar10": {
        "run.length": "200ep",
        "run.global_batch": 128,
        "optimizer": SGD | {"lr": 0.1, "weight_decay": 5e-4, "decay": "all"},
        "schedule": STEP | {"warmup": "0ep", "milestones": [60 / 200, 120 / 200, 160 / 200], "factor": 0.2},
    },
    # facebookresearch/vissl, configs/config/pretrain/jigsaw/jigsaw_8gpu_resnet.yaml.
    "pretrain/jigsaw_rn50": {
        "run.length": "105ep",
        "run.global_batch": 256,
        "optimizer": SGD | {"lr": 0.1, "lr_scaling": "linear", "lr_batch": 256, "weight_decay": 1e-4},
        "schedule": STEP
        | {"warmup": "5ep", "milestones": pytest.approx([n / 105 for n in (30, 60, 90, 100)], abs=1e-6)},
        "data.image.size": 255,
        "objective.permutations": 2000,
        "objective.tile_dim": 1000,
        "objective.hidden": None,
        "objective.tiles.size": 64,
        "objective.tiles.jitter": 21,
        "objective.tiles.grey": 0.66,
    },
    # richzhang/colorization, train/solver.prototxt and models/colorization_train_val_v2.prototxt.
    "pretrain/colorization_rn50": {
        "run.length": "500000ba",
        "run.global_batch": 40,
        "optimizer": ADAMW | {"lr": 3e-5, "betas": [0.9, 0.99], "weight_decay": 1e-3},
        "schedule": STEP | {"warmup": "0ba", "milestones": [225 / 500, 450 / 500]},
        "data.image.size": 176,
        "objective.uniform_part": 0.5,
        "objective.temperature": 0.38,
    },
    "pretrain/clip_b32_datacomp_small": CLIP | B32 | {"run.length": "12.8Msa", "run.global_batch": 4096},
    "pretrain/clip_b32_datacomp_medium": CLIP | B32 | {"run.length": "128Msa", "run.global_batch": 4096},
    "pretrain/clip_b16_datacomp_large": CLIP
    | {"run.length": "1.28Gsa", "run.global_batch": 8192, "objective.encoder": "vit_base_patch16_clip_224"},
    # Zhai et al. 2023, section 4: Adam, 1e-3, beta2 0.95, decay 1e-4 (a step's, not times the rate: 0.1 here), norm 1;
    # warm-up and eps of google-research/big_vision, siglip_lit_coco.py and optax.
    "pretrain/siglip_b16": {
        "run.length": "12.8Gsa",
        "run.global_batch": 32768,
        "optimizer": ADAMW | {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 1e-4 / 1e-3, "clip": 1.0},
        "schedule": {"name": "cosine", "warmup": "3%", "final": 0.0},
        "objective.loss": "sigmoid",
        "objective.length": 64,
        "objective.encoder": "vit_base_patch16_siglip_224",
        "objective.encoder_args": {},
    },
    # Ho et al. 2020, appendix B, and hojonathanho/diffusion, run_cifar.py: 5000 steps of warm-up.
    "pretrain/ddpm_cifar10": {
        "run.length": "800000ba",
        "run.global_batch": 128,
        "optimizer": ADAMW | DIFFUSION | {"lr": 2e-4, "clip": 1.0},
        "schedule": CONSTANT | {"warmup": "5000ba"},
        "ema.decay": 0.9999,
    },
    # Nichol and Dhariwal 2021, and openai/improved-diffusion, README; no warm-up in train_util.py.
    "pretrain/iddpm_imagenet64": {
        "run.length": "250000ba",
        "run.global_batch": 2048,
        "optimizer": ADAMW | DIFFUSION | {"lr": 3e-4},
        "schedule": CONSTANT,
        "ema.decay": 0.9999,
        "objective.steps": 4000,
    },
    # Dhariwal and Nichol 2021, table 11, and openai/guided-diffusion, train_util.py: no warm-up.
    "pretrain/adm_imagenet64": {
        "run.length": "540000ba",
        "run.global_batch": 2048,
        "optimizer": ADAMW | DIFFUSION | {"lr": 3e-4},
        "schedule": CONSTANT,
        "ema.decay": 0.9999,
        "objective.network.dropout": 0.1,
    },
    # Peebles and Xie 2023, section 4: constant rate of 1e-4, no decay, no warm-up, batch of 256.
    "pretrain/dit_imagenet64": {
        "run.length": "400000ba",
        "run.global_batch": 256,
        "optimizer": ADAMW | DIFFUSION | {"lr": 1e-4},
        "schedule": CONSTANT,
        "ema.decay": 0.9999,
        "objective.drop_condition": 0.1,
    },
    # Karras et al. 2022, table 7, and NVlabs/edm, train.py: 10 Mimg of warm-up, half-life of 0.5 Mimg.
    "pretrain/edm_cifar10": {
        "run.length": "200Msa",
        "run.global_batch": 512,
        "optimizer": ADAMW | DIFFUSION | {"lr": 1e-3},
        "schedule": CONSTANT | {"warmup": "10Msa"},
        "ema.decay": pytest.approx(0.5 ** (512 / 500_000), abs=1e-5),
    },
}


def test_every_recipe_has_a_table():
    recipes = {
        f"{p.parent.name}/{p.stem}" for kind in ("pretrain", "finetune") for p in (CONFIGS / kind).glob("*.toml")
    }
    # tests/integration/test_pretext_recipes.py holds those of papers with networks of another time.
    assert recipes - {f"pretrain/{name}_rn18_cifar10" for name in ("autoencoder", "exemplar")} == PUBLISHED.keys()


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_a_recipe_is_what_its_paper_says(recipe):
    config = load_run(CONFIGS / f"{recipe}.toml")
    settings = registry.module(OBJECTIVES, config.objective.name).Config(**config.objective.settings)
    values = config.model_dump(mode="json") | {"objective": settings.model_dump(mode="json")}
    wanted = dict(PUBLISHED[recipe])
    for table in ("optimizer", "schedule"):
        own, table_of_paper = dict(values[table]), dict(wanted.pop(table))
        if own.get("lr_scaling") == "none":  # then it means nothing
            del own["lr_batch"]
            table_of_paper.pop("lr_batch", None)
        if table == "optimizer":  # of groups what is said of them
            groups = [{k: v for k, v in g.items() if v not in (None, False, 1.0)} for g in own.pop("groups", [])]
            assert groups == wanted.pop("groups", [])
        assert own == table_of_paper, table
    for key, value in wanted.items():
        found: Any = values
        for part in key.split("."):
            found = found[part]
        assert found == value, key
