"""The frame of a page that needs nothing else, neither files nor network, and parts that pages share."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from importlib import resources
from typing import Any

from pipeline.record.files import dumps

NO_CURVES: dict[str, Any] = {"x": [], "step": [], "series": {}}


def page(title: str, body: str, curves: dict[str, Any] = NO_CURVES, wide: bool = False) -> str:
    """HTML of a whole page.

    Args:
        title: plain text.
        body: HTML.
        curves: points of the charts of class "linked", which move together.
        wide: for tables of many columns.
    """
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    # The policy is a promise that the browser keeps: this page loads nothing.
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{escape(title)} - Sluice</title><style>{_asset("page.css")}</style></head>
<body{' class="roomy"' if wide else ""}>{body}<footer>Written by Sluice, {now}.</footer><dialog></dialog>
<script type="application/json" id="curves">{_in_script(curves)}</script>
<script>{_asset("page.js")}{_asset("scores.js")}</script></body></html>
"""


def _asset(name: str) -> str:
    return resources.files("pipeline.record").joinpath(name).read_text(encoding="utf-8")


def _in_script(value: Any) -> str:
    """JSON that cannot end the script element that it stands in."""
    return dumps(value).replace("<", "\\u003c")


def tiles(facts: dict[str, str | None]) -> str:
    """A few numbers, each with its name; None has no tile."""
    shown = [f"<div><dt>{name}</dt><dd>{escape(text)}</dd></div>" for name, text in facts.items() if text is not None]
    return f'<dl class="tiles">{"".join(shown)}</dl>'


def folded(title: str, body: str) -> str:
    """HTML that a click shows."""
    return f"<details><summary>{title}</summary>{body}</details>"


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """A list of names and what they are."""
    items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in pairs)
    return f'<dl class="facts">{items}</dl>'
