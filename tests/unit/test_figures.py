"""No figure in a README is typed: texts are filled in from records, and differ from them in nothing."""

from __future__ import annotations

import re

import pytest

from tests import tables
from tests.figures import BLOCK, RECORDS, ROOT, Figure, RecordError, fill, read_record, records, renewed, written
from tests.figures import taken_over as take_over

MEASURED = re.compile(r"\|[^|]*\d (%|s|ms|MB|GB|images/s|rows/s|times|x)\b[^|]*\|")
"""A cell of a table that holds what somebody measured."""


def test_texts_say_what_the_records_say():
    paths = list(written())
    assert ROOT / "README.md" in paths and ROOT / "configs" / "README.md" in paths
    for path in paths:
        text = path.read_text(encoding="utf-8")
        assert renewed(text, records()) == text, f"{path}: python -m tests.figures writes it anew"


@pytest.mark.parametrize("path", sorted(RECORDS.glob("*.toml")), ids=lambda path: path.stem)
def test_a_record_says_where_its_figures_come_from(path):
    origin, figures = read_record(path)
    assert figures and origin["seeds"] >= 1
    assert re.fullmatch(r"[0-9a-f]{7,40}", origin["commit"])
    for figure in figures.values():
        assert figure.pattern is None or "value" in re.compile(figure.pattern).groupindex


def test_tables_hold_no_figure_that_was_typed():
    for path in [ROOT / "README.md", *ROOT.glob("*/README.md"), *ROOT.glob("configs/*/README.md")]:
        left = tables.BLOCK.sub("", BLOCK.sub("", path.read_text(encoding="utf-8")))
        typed = [line for line in left.split("\n") if MEASURED.search(line)]
        assert typed == [], f"{path}: put it into a record (tests/figures.py)"


@pytest.mark.parametrize(
    ("figure", "how", "shown"),
    [
        (Figure(82.6, spread=0.6, unit="%"), None, "82.6 % +- 0.6"),
        (Figure(82.6, spread=0.6, unit="%"), "alone", "82.6 %"),
        (Figure(82.6, spread=0.6, unit="%"), "bare", "82.6"),
        (Figure(2900, low=2894, high=2906, unit="images/s"), "range", "2,900 images/s (2,894 to 2,906)"),
        (Figure(2.2, low=1.94, high=2.98, digits=2), "range", "2.20 (1.94 to 2.98)"),
        (Figure(21, low=20), "low", "20"),
        (Figure(2e-7), None, "2e-7"),
        (Figure(0.0), None, "0.0"),
    ],
)
def test_how_a_figure_is_shown(figure, how, shown):
    known = {"run": {"seen": figure if how != "low" else Figure(21, low=20, high=21)}}
    assert fill("{run.seen}" if how is None else f"{{run.seen:{how}}}", known) == shown


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{run.other}", r"no figure run\.other; there are run\.seen"),
        ("{run.seen:range}", r"run\.seen: it has no range"),
        ("{run.seen:loud}", "no way 'loud'"),
    ],
)
def test_what_cannot_be_shown_is_named(text, said):
    with pytest.raises(RecordError, match=said):
        fill(text, {"run": {"seen": Figure(1.5)}})


def test_a_drift_is_seen_and_mended(tmp_path):
    (tmp_path / "speed.md").write_text("it took {run.seen}\nat most\n")
    known = {"run": {"seen": Figure(1.5, unit="s")}}
    page = "before\n<!-- figures: speed -->\nit took 9 s\n<!-- end of figures -->\nafter\n"
    comment = "# figures: speed\n# end of figures\n[run]\n"
    assert renewed(page, known, tmp_path) == page.replace("it took 9 s", "it took 1.5 s\nat most")
    assert (
        renewed(comment, known, tmp_path) == "# figures: speed\n# it took 1.5 s\n# at most\n# end of figures\n[run]\n"
    )
    with pytest.raises(RecordError, match=r"no text other\.md"):
        renewed(page.replace("speed", "other"), known, tmp_path)


def test_what_a_command_prints_is_taken_over():
    figure = Figure(
        1.0, unit="s", digits=2, pattern=r"^ours: (?P<value>[\d.,]+) s \((?P<low>[\d.]+) to (?P<high>[\d.]+)\)"
    )
    assert take_over({"seen": figure}, "theirs: 3 s\nours: 1,002.5 s (1.0 to 3)\n") == {
        "seen": {"value": 1002.5, "low": 1.0, "high": 3, "unit": "s", "digits": 2, "pattern": figure.pattern}
    }
    for missing in (figure, Figure(1.0)):
        with pytest.raises(RecordError, match="figure seen: pattern"):
            take_over({"seen": missing}, "theirs: 3 s\n")


def test_a_record_without_an_origin_is_refused(tmp_path):
    path = tmp_path / "run.toml"
    for body in ('command = "x"\n[figures.a]\nvalue = 1\n', (RECORDS / "mae_step.toml").read_text() + "wrong = 1\n"):
        path.write_text(body)
        with pytest.raises(RecordError, match=r"run\.toml"):
            read_record(path)
