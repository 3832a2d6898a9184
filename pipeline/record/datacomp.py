"""Results as DataComp writes them: ``eval_results.jsonl``, a line for each of its data sets, and its mean over 38.

Of its 40 data sets FairFace and UTKFace have no main metric, and so no part in the mean. A mean of fewer than the 38
is no mean of DataComp's: without all of them there is none. Table and groups: tasklist.yml and aggregate_scores.py of
github.com/mlfoundations/datacomp.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pipeline.record.clip_benchmark import Model, by_model, data_name, metric_name
from pipeline.record.files import dumps
from pipeline.record.results import Results, Row

FILE = "eval_results.jsonl"
_RECALL, _RETRIEVAL = "mean_per_class_recall", "mean_recall@1"


class _Task(NamedTuple):
    key: str
    name: str
    main: str | None = "acc1"


_TASKS = (
    _Task("vtab/caltech101", "Caltech-101", _RECALL),
    _Task("cifar10", "CIFAR-10"),
    _Task("vtab/cifar100", "CIFAR-100"),
    _Task("vtab/clevr_count_all", "CLEVR Counts"),
    _Task("vtab/clevr_closest_object_distance", "CLEVR Distance"),
    _Task("country211", "Country211"),
    _Task("vtab/dtd", "Describable Textures"),
    _Task("vtab/eurosat", "EuroSAT"),
    _Task("fgvc_aircraft", "FGVC Aircraft", _RECALL),
    _Task("food101", "Food-101"),
    _Task("gtsrb", "GTSRB"),
    _Task("imagenet1k", "ImageNet 1k"),
    _Task("imagenet_sketch", "ImageNet Sketch"),
    _Task("imagenetv2", "ImageNet v2"),
    _Task("imagenet-a", "ImageNet-A"),
    _Task("imagenet-o", "ImageNet-O"),
    _Task("imagenet-r", "ImageNet-R"),
    _Task("vtab/kitti_closest_vehicle_distance", "KITTI Vehicle Distance"),
    _Task("mnist", "MNIST"),
    _Task("objectnet", "ObjectNet"),
    _Task("vtab/flowers", "Oxford Flowers-102", _RECALL),
    _Task("vtab/pets", "Oxford-IIIT Pet", _RECALL),
    _Task("voc2007", "Pascal VOC 2007"),
    _Task("vtab/pcam", "PatchCamelyon"),
    _Task("renderedsst2", "Rendered SST2"),
    _Task("vtab/resisc45", "RESISC45"),
    _Task("cars", "Stanford Cars"),
    _Task("stl10", "STL-10"),
    _Task("sun397", "SUN397"),
    _Task("vtab/svhn", "SVHN"),
    _Task("retrieval/flickr_1k_test_image_text_retrieval", "Flickr", _RETRIEVAL),
    _Task("retrieval/mscoco_2014_5k_test_image_text_retrieval", "MSCOCO", _RETRIEVAL),
    _Task("misc/winogavil", "WinoGAViL", "jaccard_score_10-12"),
    _Task("wilds/iwildcam", "iWildCam", "F1-macro_all"),
    _Task("wilds/camelyon17", "Camelyon17"),
    _Task("wilds/fmow", "FMoW", "acc_worst_region"),
    _Task("fairness/dollar_street", "Dollar Street", "acc_top5_wg"),
    _Task("fairness/geode", "GeoDE", "acc_wg"),
    _Task("fairness/fairface", "FairFace", None),
    _Task("fairness/utkface", "UTKFace", None),
)
_GROUPS = {
    "ImageNet": ("ImageNet 1k",),
    "ImageNet dist. shifts": (
        *("ImageNet Sketch", "ImageNet v2", "ImageNet-A", "ImageNet-O", "ImageNet-R", "ObjectNet"),
    ),
    "VTAB": (
        *("Caltech-101", "CIFAR-100", "CLEVR Counts", "CLEVR Distance", "Describable Textures", "EuroSAT"),
        *("KITTI Vehicle Distance", "Oxford Flowers-102", "Oxford-IIIT Pet", "PatchCamelyon", "RESISC45", "SVHN"),
        "SUN397",
    ),
    "Retrieval": ("Flickr", "MSCOCO", "WinoGAViL"),
    "Average": tuple(task.name for task in _TASKS if task.main is not None),
}
_CALLED = {
    **{alias: task for task in _TASKS for alias in (task.key, task.key.rpartition("/")[2], task.name.lower())},
    "flickr30k": _TASKS[30],
    "mscoco_captions": _TASKS[31],
}
"""What a suite may call a data set, in small letters; also as CLIP_benchmark does, "wds/cifar10"."""


class Scored(NamedTuple):
    """A model on DataComp's data sets."""

    model: Model
    lines: str
    """Of the file."""
    means: dict[str, float]
    """Of each group that is whole; "Average" is that of all 38."""
    lacking: list[str]
    """Data sets without a main metric, of the 38."""


def scored(runs: Sequence[tuple[str, Results]]) -> Iterator[Scored]:
    """Each model that was measured on one of the data sets at least.

    Args:
        runs: of each run its name and its results.
    """
    for model, rows in by_model(runs).items():
        found = _metrics(rows)
        if not found:
            continue
        main = {task.name: m[task.main] for task, m in found.items() if task.main is not None and task.main in m}
        text = "".join(
            dumps({"key": task.key, "dataset": task.name, "metrics": metrics | {"main_metric": main.get(task.name)}})
            + "\n"
            for task, metrics in found.items()
        )
        means = {
            group: sum(main[name] for name in names) / len(names)
            for group, names in _GROUPS.items()
            if all(name in main for name in names)
        }
        yield Scored(model, text, means, [name for name in _GROUPS["Average"] if name not in main])


def _metrics(rows: Sequence[Row]) -> dict[_Task, dict[str, float]]:
    """Of each data set the metrics that DataComp knows, measured without training; the newest of several."""
    found: dict[_Task, dict[str, float]] = {}
    for row in sorted(rows, key=lambda row: row.time):
        task = _CALLED.get(data_name(row).lower().removeprefix("wds/").removeprefix("wds_"))
        if task is None or (name := _name(row, task)) is None:
            continue
        found.setdefault(task, {})[name] = row.value
    for metrics in found.values():
        both = [metrics.get(f"{side}_retrieval_recall@1") for side in ("text", "image")]
        if both[0] is not None and both[1] is not None:
            metrics[_RETRIEVAL] = (both[0] + both[1]) / 2
    return dict(sorted(found.items(), key=lambda one: _TASKS.index(one[0])))


def _name(row: Row, task: _Task) -> str | None:
    """The metric's name there; a suite's own evaluation may give the main metrics that no other has, by their names."""
    if row.metric.rpartition("/")[2] == task.main:
        return task.main
    return metric_name(row) if row.evaluation in ("zero_shot", "retrieval") else None
