"""What is published of the recipes that learn by clusters; see test_recipes.py."""

from __future__ import annotations

from typing import Any

ALL = {"lr_scaling": "none", "layer_decay": 1.0, "clip": None, "weight_decay_end": None, "lr_vectors": 1.0}
CONSTANT = {"name": "constant", "warmup": "0%", "cooldown": "0%"}
# Caron et al. 2020 and facebookresearch/swav, scripts/swav_800ep_pretrain.sh.
SWAV: dict[str, Any] = {
    "run.length": "800ep",
    "run.global_batch": 4096,
    "optimizer": ALL | {"name": "lars", "lr": 4.8, "momentum": 0.9, "weight_decay": 1e-6, "decay": "all"},
    "groups": [{"prefix": "prototypes", "frozen_until": "1ep"}],
    "schedule": {"name": "cosine", "warmup": "10ep", "final": 0.001},
    "objective.hidden": 2048,
    "objective.dim": 128,
    "objective.prototypes": 3000,
    "objective.temperature": 0.1,
    "objective.epsilon": 0.05,
    "objective.iterations": 3,
    "objective.queue": 0,
}
CLUSTERING: dict[str, dict[str, Any]] = {
    "pretrain/swav_rn50_800": SWAV,
    # scripts/swav_200ep_bs256_pretrain.sh
    "pretrain/swav_rn50_200_bs256": SWAV
    | {
        "run.length": "200ep",
        "run.global_batch": 256,
        "optimizer": SWAV["optimizer"] | {"lr": 0.6},
        "schedule": {"name": "cosine", "warmup": "0ep", "final": 0.001},
        "objective.queue": 3840,
        "objective.queue_from": 15 / 200,
    },
    # Caron et al. 2018, section 4.2, and facebookresearch/deepcluster, main.sh and main.py.
    "pretrain/deep_cluster_rn50": {
        "run.length": "200ep",
        "run.global_batch": 256,
        "optimizer": ALL | {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-5, "decay": "all"},
        "schedule": CONSTANT,
        "objective.clusters": 10_000,
        "objective.components": 256,
        "objective.iterations": 20,
        "objective.every": "1ep",
    },
    # Chang et al. 2017, section 3.3, for thresholds; the optimizer is ours.
    "pretrain/daic_cifar10": {
        "run.length": "50ep",
        "run.global_batch": 128,
        "optimizer": ALL
        | {"name": "adamw", "lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.0, "decay": "matrices"},
        "schedule": CONSTANT,
        "objective.upper": 0.95,
        "objective.lower": 0.455,
        "objective.fall": 10.0,
        "objective.clusters": 10,
    },
}
