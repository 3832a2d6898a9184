"""Results side by side: the page, its script in a browser, and the formats."""

import csv
import io
import json
import math
import subprocess

import numpy as np
import pytest

from pipeline.core.evaluation import Figure, Number, Output, Table
from pipeline.record.board import board
from pipeline.record.outputs import keep
from pipeline.record.records import About
from pipeline.record.results import Origin
from pipeline.run.__main__ import main
from tests.unit.record.fake_run import EVIL, picture
from tests.unit.record.test_report import CHROMIUM, Page

N = 300


def accuracy(name: str, share: float, seed: int) -> Number:
    hits = np.random.default_rng(seed).random(N) < share
    p = float(hits.mean())
    return Number(name, p, N, "val", math.sqrt(p * (1 - p) / N), samples=hits)


def evaluated(folder, *outputs: Output, step: int | None = 10, evaluation="knn", data_name="", **about):
    model = about.pop("model", f"step {step}" if step else "random init")
    origin = Origin(
        model, step, f"{folder.name}{model}", evaluation, {"image": {"size": 64}}, {"test": data_name or "m"}, **about
    )
    keep(folder, outputs, origin, About(data_name=data_name))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("several")
    counts = [[f"class {i}", *((20 if i == k else (3 if k == i + 1 else 0)) for k in range(4))] for i in range(4)]
    for number, name in enumerate(["mae", "clip", "mo<b>co&amp;"]):
        for step in (None, 100, 200, 300):
            share = 0.2 if step is None else 0.3 + step / 1000 + number / 20
            evaluated(
                root / name,
                accuracy("knn/top1", share, number + (step or 0)),
                Number("frechet", 40 - 50 * share, N, "val", 0.5, "lower"),
                Table("knn/confusion_k20", ("class", *(f"class {k}" for k in range(4))), counts, "val"),
                Figure("embedding_map/classes", picture(step or 0, (64, 96)).image, f"by class {EVIL}", "val"),
                step=step,
            )
    return [str(folder) for folder in sorted(root.iterdir())]


def test_the_page_of_several_runs(runs):
    html = board(runs)
    shown = Page(html)
    assert "://" not in html and "url(" not in html and "@import" not in html and len(html) < 1_000_000
    assert shown.tags.count("script") == 2 and "mo<b>co&amp;: step 300" in shown.words and "b" not in shown.tags[:20]
    assert "Models 12" in shown.words and "Metrics 2" in shown.words
    assert html.count("<tr><th>") >= 12  # more models than metrics: models are rows
    assert html.count('class="best"') == 2 and 'class="level"' in html
    assert html.count('<figure class="chart">') == 2 and html.count('data-series="run/') == 6
    assert "Taken most often: class 0 for class 1: 3 (13%)" in shown.words and html.count('class="heat"') == 3 + 1
    assert all(str(link).startswith("data:image/webp") for link in shown.links) and len(shown.links) == 4


def test_metrics_are_rows_where_there_are_more_of_them(tmp_path):
    run = evaluated(tmp_path / "a", *(Number(f"m/{i}", i / 7, N, "val") for i in range(5)))
    shown = Page(board([str(run), str(evaluated(tmp_path / "b", Number("m/0", 0.5, N, "val")))]))
    assert "Metric a: step 10 b: step 10 m/0" in shown.words


PROBE = """<script>{
const seen = document.documentElement.dataset, table = document.querySelector(".scores");
const names = () => [...table.tBodies[0].rows].filter((row) => !row.hidden).map((row) => row.cells[0].textContent);
const click = (text) => [...table.tHead.rows[0].cells].find((head) => head.textContent.startsWith(text)).click();
click("knn/top1"); seen.top = names()[0];
click("knn/top1"); seen.bottom = names()[names().length - 1] === seen.top;
click("Model"); seen.first = names()[0];
const field = document.querySelector(".tools input");
field.value = "CLIP 300"; field.dispatchEvent(new Event("input"));
seen.filtered = names().join(); seen.said = document.querySelector(".tools output").textContent;
field.value = ""; field.dispatchEvent(new Event("input"));
document.querySelector(".tools button").click();
seen.swapped = names().map((name) => name.split(" ")[0]).join() + " of " + table.tHead.rows[0].cells.length;
document.querySelector(".tools button").click();
seen.back = names().length;
const wide = document.querySelector(".board .wide"), head = table.tBodies[0].rows[0].cells[0];
wide.style.width = "260px"; const before = head.getBoundingClientRect().left;
wide.scrollLeft = 200;
seen.sticky = wide.scrollLeft > 0 && head.getBoundingClientRect().left === before;
seen.wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
const box = (node) => node.getBoundingClientRect();
const bars = [...document.querySelectorAll(".scores td i")].map((bar) => [box(bar), box(bar.parentElement)]);
seen.bars = bars.every(([bar, cell]) => bar.width >= 3 && bar.left >= cell.left && bar.right <= cell.right);
seen.barred = bars.length;
addEventListener("load", () => {
  seen.images = [...document.images].filter((image) => image.naturalWidth > 0).length + "/" + document.images.length;
});
}</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium to render the page")
def test_a_browser_sorts_filters_and_turns_the_table(runs, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(board(runs).replace("</body>", PROBE), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += ["--disable-sync", "--no-first-run", f"--user-data-dir={tmp_path / 'user'}", "--window-size=700,900"]
    logged = ["--enable-logging=stderr", "--virtual-time-budget=1000", "--dump-dom", page.as_uri()]
    done = subprocess.run([*command, *logged], capture_output=True, text=True, timeout=120, check=True)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    root = done.stdout.partition("<html")[2].partition(">")[0]
    expected = {
        "ready": "yes",
        "top": "mo&lt;b&gt;co&amp;amp;: step 300",
        "bottom": "true",
        "first": "clip: random init",
        "filtered": "clip: step 300",
        "said": "1 of 12",
        "swapped": "knn/top1,frechet of 13",
        "back": "12",
        "sticky": "true",
        "wide": "false",
        "bars": "true",
        "barred": "24",
        "images": "4/4",
    }
    for name, value in expected.items():
        assert f'data-{name}="{value}"' in root.replace("<", "&lt;").replace(">", "&gt;"), root


def output(capsys, *words) -> str:
    assert main([str(word) for word in words]) == 0
    return capsys.readouterr().out


def options(runs) -> list[str]:
    return [word for run in runs for word in ("--run", run)]


def test_formats_hold_the_same_numbers(runs, capsys, tmp_path):
    table = list(csv.DictReader(io.StringIO(output(capsys, "report", *options(runs), "--format", "csv"))))
    body = json.loads(output(capsys, "report", *options(runs), "--format", "json"))
    assert len(table) == 24 and [float(row["value"]) for row in table] == [one["value"] for one in body["numbers"]]
    assert json.loads(table[0]["settings"]) == {"image": {"size": 64}} and table[0]["mark"] in ("", "level", "best")
    assert len(body["tables"]) == len(body["figures"]) == 12
    text = output(capsys, "report", *options(runs), "--format", "md")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 4 and text.count("**") >= 4 and "\u00b1" in text
    assert output(capsys, "report", *options(runs[:1]), "--format", "text").count("knn/top1") == 1
    file = tmp_path / "new" / "table.csv"
    assert output(capsys, "report", *options(runs), "--format", "csv", "--out", file).strip() == str(file)
    assert len(file.read_text().splitlines()) == 25


def test_where_pages_and_tables_go(runs, capsys, tmp_path):
    assert "knn/top1" in output(capsys, "report", *options(runs))
    page = tmp_path / "page.html"
    assert output(capsys, "report", *options(runs), "--out", page).strip() == str(page)
    assert page.read_text().startswith("<!doctype html>")
    run = evaluated(tmp_path / "run", accuracy("knn/top1", 0.5, 0))
    (run / "config.toml").write_text("[run]\n")
    assert output(capsys, "report", "--run", run).strip() == str(run / "report.html")
    assert output(capsys, "report", "--run", run, "--out", page).strip() == str(page)
    assert "Sluice run" in page.read_text()


def test_a_folder_of_results_that_is_no_run_has_a_page_of_results(capsys, tmp_path):
    folder = evaluated(tmp_path / "out", accuracy("knn/top1", 0.5, 0), model="mae: step 5", step=5)
    assert output(capsys, "report", "--run", folder).strip() == str(folder / "report.html")
    shown = Page((folder / "report.html").read_text())
    assert "Sluice results out " in shown.words and "mae: step 5" in shown.words and "Steps" not in shown.words
    assert "out: mae" not in shown.words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "html"], "a page of several runs needs a place: --out FILE.html"),
        (["--format", "datacomp"], "datacomp is a folder of files: name it, --out FOLDER"),
        (["--format", "datacomp", "--out", "{tmp}/x"], "none of DataComp's data sets was measured"),
        (["--format", "clip_benchmark", "--out", "{tmp}/x"], "CLIP_benchmark knows zero_shot, retrieval and linear"),
        (["--format", "md", "--out", "{tmp}/file/x"], "cannot write .*/file/x"),
    ],
)
def test_what_cannot_be_written_is_refused(runs, capsys, tmp_path, words, message):
    (tmp_path / "file").write_text("")
    assert main(["report", *options(runs), *(word.format(tmp=tmp_path) for word in words)]) == 2
    assert message.partition(".*")[0] in capsys.readouterr().err
    assert main(["report", "--run", runs[0], "--out", str(tmp_path / "file" / "x.html")]) == 2
    assert "x.html (File exists); name another by --out" in capsys.readouterr().err


def test_a_run_without_results_has_no_table(capsys, tmp_path):
    (tmp_path / "config.toml").write_text("[run]\n")
    assert main(["report", "--run", str(tmp_path), "--format", "csv"]) == 2
    assert f"{tmp_path} has no results; evaluate it first" in capsys.readouterr().err


def test_compare_is_a_command(runs, capsys):
    text = output(capsys, "compare", *runs[:2], "--format", "text")
    assert "mae: step 300 against clip: step 300" in text and "McNemar" in text
    assert json.loads(output(capsys, "compare", "--format", "json", *runs))["subjects"][0] == "clip: step 300"
    assert main(["compare", runs[0], "nothing"]) == 2 and "has no model 'nothing'" in capsys.readouterr().err


def test_a_hundred_models_on_fifty_tasks(tmp_path):
    """One folder of results as a large comparison would leave it."""
    rng = np.random.default_rng(0)
    for model in range(100):
        shares = rng.random(50) * 0.2 + 0.4 + model / 500
        evaluated(
            tmp_path / "all",
            *(accuracy(f"task_{task}/top1", share, task) for task, share in enumerate(shares)),
            model=f"model {model}",
            step=None,
        )
    html = board([str(tmp_path / "all")])
    assert html.count(' data-v="') == 5000 and len(html) < 1_000_000
    assert Page(html).tags.count("tr") == 101


@pytest.fixture
def clip(tmp_path):
    run = tmp_path / "clip_b16"
    zero_shot = [
        Number(f"zero_shot/{name}", v, N, "val")
        for name, v in (("top1", 0.5), ("top5", 0.8), ("mean_class_recall", 0.45))
    ]
    evaluated(run, *zero_shot, evaluation="zero_shot", data_name="vtab/caltech101", step=300)
    sides = [
        Number(f"retrieval/top{k}_{side}", v, N, "val")
        for k, side, v in ((1, "text", 0.4), (1, "image", 0.3), (5, "text", 0.7))
    ]
    evaluated(run, *sides, evaluation="retrieval", data_name="flickr30k", step=300)
    evaluated(run, Number("linear_probe/top1", 0.9, N, "val"), evaluation="linear_probe", data_name="cifar10", step=300)
    return run


def test_clip_benchmarks_files(clip, capsys, tmp_path):
    said = output(capsys, "report", "--run", clip, "--format", "clip_benchmark", "--out", tmp_path / "json")
    found = {path.name: json.loads(path.read_text()) for path in (tmp_path / "json").iterdir()}
    assert said.startswith("3 files in ")
    caltech = found["vtab-caltech101_step-300_clip_b16_en_zeroshot_classification.json"]
    assert caltech == {
        "dataset": "vtab/caltech101",
        "model": "clip_b16",
        "pretrained": "step 300",
        "task": "zeroshot_classification",
        "metrics": {"acc1": 0.5, "acc5": 0.8, "mean_per_class_recall": 0.45},
        "language": "en",
    }
    retrieval = found["flickr30k_step-300_clip_b16_en_zeroshot_retrieval.json"]["metrics"]
    assert retrieval == {
        "text_retrieval_recall@1": 0.4,
        "image_retrieval_recall@1": 0.3,
        "text_retrieval_recall@5": 0.7,
    }
    assert found["cifar10_step-300_clip_b16_en_linear_probe.json"]["metrics"] == {"lp_acc1": 0.9}
    evaluated(
        clip,
        Number("zero_shot/top1", 0.6, N, "val"),
        evaluation="zero_shot",
        data_name="vtab/caltech101",
        step=300,
        seed=1,
    )
    output(capsys, "report", "--run", clip, "--format", "clip_benchmark", "--out", tmp_path / "two")
    assert len(list((tmp_path / "two").iterdir())) == 4  # another seed's has a file of its own


def test_datacomps_file_says_what_lacks(clip, capsys, tmp_path):
    said = output(capsys, "report", "--run", clip, "--format", "datacomp", "--out", tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "eval_results.jsonl").read_text().splitlines()]
    assert [(line["key"], line["dataset"], line["metrics"]["main_metric"]) for line in lines] == [
        ("vtab/caltech101", "Caltech-101", 0.45),
        ("retrieval/flickr_1k_test_image_text_retrieval", "Flickr", pytest.approx(0.35)),
    ]
    assert "no average over the 38 data sets, 36 lack: CIFAR-10, " in said and "Caltech-101" not in said


def test_datacomps_mean_is_that_of_all_38(capsys, tmp_path):
    from pipeline.record.datacomp import _TASKS

    main_metrics = {"acc1": "top1", "mean_per_class_recall": "mean_class_recall"}
    values = {}
    for number, task in enumerate(_TASKS):
        if task.main == "mean_recall@1":
            numbers = [Number(f"retrieval/top1_{side}", number / 100, N, "val") for side in ("text", "image")]
        else:
            name = main_metrics.get(task.main or "acc1", task.main)
            numbers = [Number(f"zero_shot/{name}", number / 100, N, "val")]
        if task.main is not None:
            values[task.name] = number / 100
        kind = "retrieval" if task.main == "mean_recall@1" else "zero_shot"
        called = task.key if number % 2 else task.name
        evaluated(tmp_path / "run", *numbers, evaluation=kind, data_name=called)
    said = output(capsys, "report", "--run", tmp_path / "run", "--format", "datacomp", "--out", tmp_path / "out")
    assert len(values) == 38 and len((tmp_path / "out/eval_results.jsonl").read_text().splitlines()) == 40
    assert f"Average {sum(values.values()) / 38:.4f}" in said and "lack" not in said
    shifts = ("ImageNet Sketch", "ImageNet v2", "ImageNet-A", "ImageNet-O", "ImageNet-R", "ObjectNet")
    assert f"dist. shifts {sum(values[name] for name in shifts) / 6:.4f}" in said
