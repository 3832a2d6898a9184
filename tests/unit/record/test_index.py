"""The page of many runs: whole without its script, and with it sorted, filtered and drawn by a real browser."""

from __future__ import annotations

import math
import re
import subprocess
from html import escape
from pathlib import Path

import pytest

from pipeline.record import notes, runs
from pipeline.record.index import index_page
from pipeline.record.runs import Listed
from tests.unit.launch.many_runs import make_run, top1
from tests.unit.record.fake_run import EVIL
from tests.unit.record.test_report import CHROMIUM, Page

LRS = (1e-4, 1e-3, 1.1e-2)
SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Listed]:
    """Nine runs over three learning rates and seeds, and one that has failed with odd words."""
    root = tmp_path_factory.mktemp("sweep")
    folders = [make_run(root / f"lr={lr:g},seed={seed}", lr=lr, seed=seed) for lr in LRS for seed in SEEDS]
    folders.append(make_run(root / "bad", lr=1.0, outcome="failed", error=f"loss is nan {EVIL}"))
    notes.remark(folders[0], "ann", f"first {EVIL}", ["base<b>"], [])
    return [runs.read_run(folder, settings=True) for folder in folders]


def test_all_is_there_without_the_script(found):
    page = Page(index_page(found))
    assert page.links == [] and "10 runs" in page.words and "9 finished" in page.words
    assert page.tags.count("tr") == 11
    for text in (
        "lr=0.0001,seed=0",
        "0.750 \u00b1 0.010",
        "100 / 300",
        f"first {EVIL}",
        f"loss is nan {EVIL}",
        "base<b>",
    ):
        assert " ".join(text.split()) in page.words
    assert "objective.mask_ratio 0.75" in page.words.partition("that all have in common")[2]


def test_only_what_differs_has_columns(found):
    head = index_page(found).partition("</thead>")[0]
    assert "optimizer</small>lr" in head and "run</small>seed" in head and "mask_ratio" not in head


def test_texts_end_no_element(found):
    html = index_page(found)
    assert "<script>alert" not in html and html.count("</script>") == 2 and escape(EVIL) in html


def test_odd_values(tmp_path):
    """Runs without a configuration, without metrics, with numbers that are not finite; and no runs at all."""
    facts = {
        "run": str(tmp_path / "a"),
        "state": "died",
        "step": 0,
        "total_steps": None,
        "tags": [],
        "note": "",
        "error": "",
    }
    odd = Listed(tmp_path / "a", facts, {}, {"loss": math.inf, "knn/top1": math.nan}, {"knn/top1": "higher"})
    other = Listed(
        tmp_path / "b", facts | {"run": str(tmp_path / "b")}, {"optimizer.betas": [0.9, 0.95], "x.y": True}, {}
    )
    page = Page(index_page([odd, other]))
    assert "inf" in page.words and "0.9, 0.95" in page.words and "absent" not in page.words
    assert "0 runs" in Page(index_page([])).words


PROBE = r"""<script>addEventListener("load", () => {
const seen = document.documentElement.dataset, all = (what) => [...document.querySelectorAll(what)];
const dots = () => all(".scatter circle:not(.faint)"), height = (dot) => Number(dot.getAttribute("cy"));
const names = () => all("#table tbody tr").filter((r) => !r.hidden).map((r) => r.cells[0].textContent).join(" ");
const type = (id, value, kind) => { get(id).value = value; get(id).dispatchEvent(new Event(kind)); };
const filtered = (text) => { type("filter", text, "input"); return names(); };
const head = (name) => document.querySelector(`th[data-column="${column(name)}"] button`);
type("y", column("knn/top1"), "change");
type("x", column("optimizer.lr"), "change");
type("colour", -1, "change");
seen.means = dots().length;
seen.level = Math.abs(height(dots()[0]) - height(all(".faint")[1])) < 0.01;
seen.higher = height(dots()[1]) < height(dots()[0]) && height(dots()[1]) < height(dots()[2]);
get("gather").click();
seen.single = dots().length;
get("gather").click();
dots()[1].dispatchEvent(new Event("pointerenter"));
seen.tip = document.querySelector(".tip").textContent.replaceAll("\n", "|");
dots()[1].dispatchEvent(new Event("click"));
seen.picked = all(".picked").length;
head("knn/top1").click();
seen.best = names();
head("knn/top1").click();
seen.worst = names();
seen.compared = filtered("optimizer.lr > 1e-4 and run.seed = 1");
seen.count = get("count").textContent;
seen.words = filtered("seed=2 0.011");
filtered("optimzer.lr > 1");
seen.wrong = get("count").textContent;
filtered("");
document.querySelector('.chips [data-state="failed"]').click();
seen.failed = names();
get("chooser").querySelectorAll("input")[column("run.seed")].click();
seen.hidden = head("run.seed").closest("th").hidden;
seen.wide = document.documentElement.scrollWidth > innerWidth;
});</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium to render the page")
def test_a_browser_sorts_filters_and_draws(found, tmp_path):
    probed = tmp_path / "probed.html"
    probed.write_text(index_page(found).replace("</body>", PROBE), encoding="utf-8")
    root = browsed(probed, tmp_path, 900)
    order = sorted((top1(lr, 0.75, seed), f"lr={lr:g},seed={seed}") for lr in LRS for seed in SEEDS)
    last, first = order[0][1], order[-1][1]
    seen = dict(re.findall(r'data-([a-z]+)="([^"]*)"', root))
    assert (seen["means"], seen["single"], seen["level"], seen["higher"]) == ("3", "9", "true", "true")
    assert seen["tip"].endswith("knn/top1: 0.81 \u00b1 0.005774 (n = 3)|optimizer.lr: 0.001") and seen["picked"] == "3"
    assert (seen["best"].split()[0], seen["best"].split()[-1]) == (first, "bad")  # that has no result
    assert (seen["worst"].split()[0], seen["worst"].split()[-1]) == (last, "bad")
    assert sorted(seen["compared"].split()) == ["lr=0.001,seed=1", "lr=0.011,seed=1"] and seen["count"] == "2 of 10"
    assert seen["words"] == "lr=0.011,seed=2" and seen["wrong"] == "no run has optimzer.lr"
    assert (seen["failed"], seen["hidden"], seen["wide"]) == ("bad", "true", "false")


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium to render the page")
def test_a_browser_shows_odd_pages_without_errors(found, tmp_path):
    """Also of one run, where no settings differ, and of none."""
    for number, some in enumerate(([], found[:1])):
        page = tmp_path / f"{number}.html"
        page.write_text(index_page(some), encoding="utf-8")
        assert 'data-ready="yes"' in browsed(page, tmp_path, 500)


def browsed(page: Path, place: Path, width: int) -> str:
    """The root element of a page after its scripts have run, of which none has complained."""
    quiet = ["--disable-background-networking", "--disable-sync", "--no-first-run", f"--user-data-dir={place / 'user'}"]
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", *quiet, f"--window-size={width},900"]
    logged = ["--enable-logging=stderr", "--virtual-time-budget=1000", "--dump-dom", page.as_uri()]
    done = subprocess.run([*command, *logged], capture_output=True, text=True, timeout=120, check=True)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    return done.stdout.partition("<html")[2].partition(">")[0]
