"""Tables and figures of evaluations, as the report shows them: the newest models first, and as much as fits a page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TypeVar

from pipeline.record.confusion import heat_map, matrix_of
from pipeline.record.formats import decimals
from pipeline.record.lines import aligned
from pipeline.record.pictures import Shot, Shown, encode, shot
from pipeline.record.records import FOLDER
from pipeline.record.results import Cell, Found, KeptFigure, KeptTable, Results

ROWS = 50
"""Most rows of a table."""
OPEN = 20
"""Most rows of a table that is not folded."""
MODELS = 4
"""Most models of a table or figure."""
FIGURE_BYTES = 1_200_000
"""Most bytes of all figures, before base64."""

F = TypeVar("F", bound=Found)


def exhibits(results: Results) -> str:
    """HTML of all tables and figures; empty where there are none. Files of figures are whole paths."""
    tables = "".join(_tables(apart, cells) for apart, cells in aligned(results.tables))
    return (f"<h2>Tables</h2>{tables}" if tables else "") + _figures(results.figures)


def _newest(cells: Sequence[F | None]) -> list[F]:
    """Of all models those that were measured, the last step first."""
    return [cell for cell in reversed(cells) if cell is not None]


def _title(found: Found, apart: str) -> str:
    name = f"{found.metric} [{apart}]" if apart else found.metric
    return f"<h3>{escape(name)} <small>{escape(found.evaluation)} on {escape(found.split)}</small></h3>"


def _left_out(count: int, what: str, where: str) -> str:
    return f"<p class=soft>and {count:,} more {what}{'s' * (count > 1)} in {where}</p>" if count > 0 else ""


def _tables(apart: str, cells: Sequence[KeptTable | None]) -> str:
    """A table of several models, folded where it is long or not the newest."""
    found = _newest(cells)
    parts: list[str] = []
    for table in found[:MODELS]:
        matrix = matrix_of(table)
        is_open = not parts and (matrix is not None or len(table.rows) <= OPEN)
        body = _table(table) if matrix is None else heat_map(matrix)
        title = f"<summary>{escape(table.model)}</summary>"
        parts.append(f"<details{' open' * is_open}>{title}{body}</details>")
    return _title(found[0], apart) + "".join(parts) + _left_out(len(found) - len(parts), "model", f"{FOLDER}/")


def _table(table: KeptTable) -> str:
    columns = [[row[at] for row in table.rows[:ROWS]] for at in range(len(table.columns))]
    cells = [_column(column) for column in columns]
    kinds = [" class=text" if any(isinstance(cell, str) for cell in column) else "" for column in columns]
    head = "".join(f"<th{kind}>{escape(name)}</th>" for kind, name in zip(kinds, table.columns, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{text}</td>" for kind, text in zip(kinds, row, strict=True)) + "</tr>"
        for row in zip(*cells, strict=True)
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        f"{_left_out(len(table.rows) - ROWS, 'row', table.record)}</div>"
    )


def _column(cells: Sequence[Cell]) -> list[str]:
    """HTML of a column's cells, fractions to the same place after the point."""
    places = decimals([cell for cell in cells if isinstance(cell, float)], [])
    return [_cell(cell, places) for cell in cells]


def _cell(cell: Cell, places: int) -> str:
    if isinstance(cell, float):
        return f"{cell:.{places}f}"
    return f"{cell:,}" if isinstance(cell, int) else escape(cell or "")


def _figures(figures: Sequence[KeptFigure]) -> str:
    """Each figure's newest models, as many as fit; the newest of each before any older one."""
    groups = [(apart, _newest(cells)) for apart, cells in aligned(figures)]
    drawn: dict[tuple[object, ...], str] = {}
    room = FIGURE_BYTES
    for age in range(MODELS):
        for _, found in groups:
            if age < len(found):
                picture = _encoded(found[age])
                size = 0 if isinstance(picture, str) else len(picture.data)
                if size <= room:
                    drawn[found[age].key] = picture if isinstance(picture, str) else shot(picture)
                    room -= size
    sections = []
    for apart, found in groups:
        shown = [drawn[figure.key] for figure in found if figure.key in drawn]
        more = _left_out(len(found) - len(shown), "model", f"{FOLDER}/")
        sections.append(f'{_title(found[0], apart)}<div class="shots">{"".join(shown)}</div>{more}')
    return f"<h2>Figures</h2>{''.join(sections)}" if sections else ""


def _encoded(figure: KeptFigure) -> Shot | str:
    """The picture; or, where its file cannot be read, words that say so."""
    try:
        return encode(Shown(figure.model, Path(figure.file), figure.caption))
    except OSError as error:
        return f"<p class=soft>{escape(figure.model)}: {escape(figure.file)} cannot be read ({escape(str(error))})</p>"
