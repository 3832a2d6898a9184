import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from pipeline.core.errors import ConfigError, DataError
from pipeline.core.evaluation import Figure, Output, Table
from pipeline.record import exhibits, report
from pipeline.record.metrics import MetricsLog
from pipeline.record.outputs import keep
from pipeline.record.paces import Paces, Slow
from pipeline.record.pictures import Shown, encode
from pipeline.record.report import write_report
from pipeline.record.results import Origin
from pipeline.record.showcase import save_pictures
from pipeline.record.state import State, write_state
from tests.unit.record.fake_run import EVIL, picture, write_run

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
VOID = {"meta", "img", "path", "br", "input"}


class Page(HTMLParser):
    """Checks that elements are closed in order, and gathers what the tests ask for."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str | None] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "srcset", "data", "action")]
        assert not any(k.startswith("on") for k, _ in attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def page(folder) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "mae <glyphs>")


def test_the_page_of_a_whole_run(run):
    html = write_report(run).read_text(encoding="utf-8")
    shown = Page(html)
    assert len(html) < 2_000_000
    assert all(str(link).startswith("data:image/webp;base64,") for link in shown.links) and len(shown.links) == 12
    assert "://" not in html and "url(" not in html and "@import" not in html
    for text in ("mae <glyphs>", "finished", "node-018", "0123456789", "uncommitted", "run.name=<b>x</b>", EVIL):
        assert text in shown.words, text
    for text in ("Steps 3,000", "Restarts 1", "Training time 6 m", "inf at step 900", "Step 500", "mask_ratio = 0.75"):
        assert text in shown.words, text
    assert "0.7540 \u00b1 0.0060" in shown.words
    assert html.count('<td class="best" ') == 4


def test_nothing_that_a_user_wrote_becomes_markup(run):
    shown = page(run)
    assert shown.tags.count("script") == 2
    # 8 captions, the note, the configuration; a name, and of 4 models a column, a class and a figure's caption
    assert shown.words.count("alert('x')") == 10 + 1 + 4 * 3


def test_names_of_metrics_cannot_end_the_script(tmp_path):
    log = MetricsLog(tmp_path)
    log.append({"step": 1, "</script><b>": 1.0, "a/</script>": 2.0})
    log.close()
    shown = page(tmp_path)
    assert shown.tags.count("script") == 2 and "</script><b>" in shown.words


def test_a_run_that_has_only_begun(tmp_path):
    (tmp_path / "config.toml").write_text("[run]\n")
    words = page(tmp_path).words
    assert "No metrics were logged yet" in words and "No evaluation was run yet" in words and "Showcase" not in words


def show(folder, step: int, *outputs: Output) -> None:
    settings = {"of": [output.name for output in outputs]}  # a record each
    keep(folder, outputs, Origin(f"step {step}", step, f"w{step}", "shown", settings, {"test": "m" * 32}))


def test_a_table_of_an_evaluation_is_bounded_and_says_so(tmp_path):
    rows = [(f"<class {i}>", 1000 + i, i / 1000, None) for i in range(53)]
    for step in range(1, 7):
        show(tmp_path, step, Table("zero_shot/classes", ("class", "images", "recall", "more"), rows, "val"))
    shown = page(tmp_path)
    tables = shown.words.split(" Tables ")[1]
    assert tables.startswith("zero_shot/classes shown on val step 6 class images recall more <class 0> 1,000 0.00000 ")
    assert "<class 49> 1,049 0.04900 and 3 more rows in results/shown-" in tables and "<class 50>" not in tables
    assert [f"step {n} class" in tables for n in range(1, 7)] == [False, False, True, True, True, True]
    assert "and 2 more models in results/" in tables and shown.tags.count("details") == 4 + 1  # and where they lie
    show(tmp_path, 7, Table("few/classes", ("class", "recall"), [("a", 0.5)], "val"))
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert html.count("<details open>") == 1 and "<details open><summary>step 7</summary>" in html  # long ones fold


def test_figures_of_evaluations_are_in_the_page_as_many_as_fit(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        show(tmp_path, step, Figure("map/classes", picture(step * 900, (64, 64)).image, f"{step} <b>", "val"))
    show(tmp_path, 3, Figure("map/severe", picture(2700, (64, 64)).image, "severe", "val"))
    assert len(page(tmp_path).links) == 4 and "3 <b> step 2 2 <b> step 1 1 <b>" in page(tmp_path).words
    monkeypatch.setattr(exhibits, "FIGURE_BYTES", 0)
    shown = page(tmp_path)
    assert shown.links == [] and "and 3 more models in results/" in shown.words
    sizes = [len(encode(Shown("", p, "")).data) for p in (tmp_path / "results").glob("*.png")]
    monkeypatch.setattr(exhibits, "FIGURE_BYTES", 2 * max(sizes))
    shown = page(tmp_path)  # the newest of both come first
    assert "step 3 3 <b>" in shown.words and "step 3 severe" in shown.words and "step 1 1" not in shown.words


def test_a_figure_whose_file_is_gone_is_told(tmp_path):
    show(tmp_path, 1, Figure("map/classes", picture(1, (64, 64)).image, "", "val"))
    (file,) = (tmp_path / "results").glob("*.png")
    file.write_bytes(b"no picture")
    assert f"step 1: {file} cannot be read" in page(tmp_path).words
    file.unlink()
    assert f"step 1: {file} cannot be read" in page(tmp_path).words


@pytest.mark.parametrize("row", [{"step": 1}, {"step": 1, "loss": math.nan}, {"step": 5, "loss": 1.0, "samples": 40}])
def test_one_line_of_metrics(tmp_path, row):
    log = MetricsLog(tmp_path)
    log.append(row)
    log.close()
    assert f"Steps {row['step']}" in page(tmp_path).words


def test_a_failed_run_says_why(tmp_path):
    (tmp_path / "config.toml").write_text("[run]\n")
    write_state(tmp_path, State("failed", 70, 7, 2, "loss is nan on rank <1>"))
    start = {"command": ["sluice", "train"], "world_size": 1, "plan": {"total_steps": 90}, "git": {"commit": None}}
    (tmp_path / "provenance.json").write_text(json.dumps(start))
    words = page(tmp_path).words
    assert "failed" in words and "loss is nan on rank <1>" in words and "$ sluice train" in words
    assert "Restarts 2" in words and "Steps 7 / 90" in words and "1 process " in words


def test_torn_lines_are_told(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\n{"step": 2, "lo')
    assert "1 torn line" in page(tmp_path).words


def test_pictures_are_thinned_until_they_fit(tmp_path, monkeypatch):
    (tmp_path / "config.toml").write_text("[run]\n")
    for step in range(1, 21):
        save_pictures(tmp_path, step, {"grid": picture(step * 10, (64, 64))})
    shown = page(tmp_path)
    steps = [int(w) for w in shown.words.split("Showcase")[1].split() if w.isdigit()]
    assert len(shown.links) == 8 and "8 of 20 steps" in shown.words
    assert "Step 1 " in shown.words and "Step 20 " in shown.words and steps
    monkeypatch.setattr(report, "PICTURE_BYTES", sum(len(str(link)) for link in shown.links) * 3 // 4 // 2)
    fewer = page(tmp_path)
    assert 2 <= len(fewer.links) <= 4 and "Step 1 " in fewer.words and "Step 20 " in fewer.words
    monkeypatch.setattr(report, "PICTURE_BYTES", 0)
    assert len(page(tmp_path).links) == 1 and "Step 20 " in page(tmp_path).words


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="not a run's folder"):
        write_report(tmp_path)


def test_damaged_provenance_is_named(tmp_path):
    (tmp_path / "config.toml").write_text("")
    (tmp_path / "provenance.json").write_text("{")
    with pytest.raises(DataError, match=r"provenance\.json"):
        write_report(tmp_path)


def test_a_start_tells_what_changed_since_the_one_before(run):
    words = page(run).words
    assert words.split("what was different")[1].startswith(" time 2026-01-05T10:03:10+00:00 host node-018 Written by")


PROBE = """<script>{
const plots = [...document.querySelectorAll(".linked .plot")], box = plots[1].getBoundingClientRect();
plots[1].dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width / 2, clientY: box.top + 5 }));
const seen = document.documentElement.dataset;
seen.crosses = plots.filter((plot) => plot.querySelector(".cross")).length + "/" + plots.length;
seen.moment = document.querySelector(".moment").textContent;
seen.lr = [...document.querySelectorAll("output")].find((o) => o.dataset.series === "lr").textContent;
seen.wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
document.querySelector(".shots img").click();
addEventListener("load", () => {
  seen.images = [...document.images].filter((image) => image.naturalWidth > 0).length + "/" + document.images.length;
  seen.zoomed = document.querySelector("dialog").open;
});
}</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium to render the page")
def test_a_browser_shows_the_page_without_errors(run, tmp_path):
    html = write_report(run).read_text(encoding="utf-8")
    probed = tmp_path / "probed.html"
    probed.write_text(html.replace("</body>", PROBE), encoding="utf-8")
    quiet = [
        "--disable-background-networking",
        "--disable-sync",
        "--no-first-run",
        f"--user-data-dir={tmp_path / 'user'}",
    ]
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", *quiet, "--window-size=500,900"]
    logged = ["--enable-logging=stderr", "--virtual-time-budget=1000", "--dump-dom", probed.as_uri()]
    done = subprocess.run([*command, *logged], capture_output=True, text=True, timeout=120, check=True)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    root = done.stdout.partition("<html")[2].partition(">")[0]
    expected = {"ready": "yes", "crosses": "9/9", "moment": "step 1,500", "lr": "7.5e-5", "wide": "false"}
    for name, value in (expected | {"images": "13/13", "zoomed": "true"}).items():
        assert f'data-{name}="{value}"' in root, root


def test_the_ranks_own_times(tmp_path):
    (tmp_path / "config.toml").write_text("")
    own = [[0.01, 0.5 + rank / 1000, 0.0, 0.0] for rank in range(99)]
    Paces(0, 30, 1.0, ["<n>"] * 99, own, [Slow(98, "<n>", 78.4, "step", 20)]).write(tmp_path)
    html = write_report(tmp_path).read_text()
    assert "rank 98 on &lt;n&gt; was slow in &quot;step&quot;" in html and "<n>" not in html
    ranks = re.findall(r"<tr><td>(\d+)</td><td>&lt;n&gt;</td><td>0.01</td><td>(0.\d+)</td>", html)
    assert [int(rank) for rank, _ in ranks] == [*range(98, 34, -1), 49], "the slowest, and the one in the middle"
    assert all(float(seconds) == pytest.approx(0.5 + int(rank) / 1000) for rank, seconds in ranks)
    Paces(0, 30, 1.0, ["n"], own[:1]).write(tmp_path)
    assert "Own time" not in write_report(tmp_path).read_text()
