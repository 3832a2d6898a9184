import json
import math
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.record.files import Lines, dumps, number, read_lines


def refuse(literal: str) -> None:
    raise AssertionError(f"{literal} is not JSON")


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True)))
def test_any_float_survives_strict_json(values):
    text = dumps({"a": values, "b": {"c": tuple(values)}})
    read = json.loads(text, parse_constant=refuse)
    for found in (read["a"], read["b"]["c"]):
        assert [repr(number(v)) for v in found] == [repr(v) for v in values]


def test_what_json_cannot_hold_is_refused():
    with pytest.raises(TypeError):
        dumps({"a": object()})


def test_a_file_cut_at_any_byte_is_mended_by_the_next_line(tmp_path):
    path = tmp_path / "lines"
    lines = Lines(path)
    rows = [{"step": i, "loss": math.nan, "text": "\u00e9"} for i in range(3)]
    for row in rows:
        lines.append(row)
    lines.close()
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    assert len(ends) == 3
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        lines = Lines(path)
        lines.append({"step": 99})
        lines.close()
        read, torn = read_lines(path)
        complete = sum(cut >= end - 1 for end in ends)  # all but the line's end is a whole line, too
        assert [row["step"] for row in read] == [*range(complete), 99]
        assert torn == (cut not in (0, *ends, *(end - 1 for end in ends)))


def test_a_reader_meets_a_torn_line_before_it_is_mended(tmp_path):
    path = tmp_path / "lines"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "te\xc3')
    assert read_lines(path) == ([{"step": 1}], 1)


def test_no_file_has_no_lines(tmp_path):
    assert read_lines(tmp_path / "none") == ([], 0)


def test_a_line_is_one_write_and_survives_a_partial_one(tmp_path, monkeypatch):
    real, sizes = os.write, []

    def write(file: int, data: bytes) -> int:
        sizes.append(len(data))
        return real(file, data[:limit])

    lines = Lines(tmp_path / "lines")
    monkeypatch.setattr(os, "write", write)
    limit = 1000
    lines.append({"step": 1})
    assert len(sizes) == 1
    limit = 3
    lines.append({"step": 2})
    monkeypatch.undo()
    lines.close()
    assert read_lines(tmp_path / "lines") == ([{"step": 1}, {"step": 2}], 0)


def test_a_full_disk_is_an_error():
    lines = Lines.__new__(Lines)
    lines._file = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(OSError, match="No space left"):
        lines.append({"step": 1})
    lines.close()
