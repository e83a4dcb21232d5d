"""The strict JSON reader: what it takes, what it refuses, and where it says so."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastjax.data import json_rows, opened_file
from fastjax.data.bad_rows import BadRows
from fastjax.data.json_rows import read_json_rows
from fastjax.errors import DataError


def rows_of(tmp_path, raw: bytes, allowed: int = 0):
    path = tmp_path / "data.jsonl"
    path.write_bytes(raw)
    bad_rows = BadRows(allowed)
    return list(read_json_rows(path, bad_rows)), bad_rows


@pytest.mark.parametrize(
    ("raw", "columns", "lines"),
    [
        (b'{"a": 1}\n{"a": 2}', [{"a": 1}, {"a": 2}], [1, 2]),
        (b'\xef\xbb\xbf{"a": 1}\n', [{"a": 1}], [1]),
        (b'{"a": 1}\r\n\r\n{"a": 2}\r\n', [{"a": 1}, {"a": 2}], [1, 3]),
        (b'[{"a": 1},\n {"a": 2}]\n', [{"a": 1}, {"a": 2}], [1, 2]),
        (b"[]", [], []),
        (b'{\n  "a": 1\n}\n{\n  "a": 2\n}', [{"a": 1}, {"a": 2}], [1, 4]),
        (b"", [], []),
        (b" \n\n", [], []),
    ],
)
def test_accepts(tmp_path, raw, columns, lines):
    rows, _ = rows_of(tmp_path, raw)
    assert [row.columns for row in rows] == columns
    assert [int(row.where.rsplit(":", 1)[1]) for row in rows] == lines


@pytest.mark.parametrize(
    ("raw", "where", "what"),
    [
        (b'{"a": 1}\n{"a": \n', ":2:7", "Expecting value"),
        (b'{"a": 1}\n{"a": 2', ":2:8", "delimiter"),
        (b'{"a": NaN}', ":1", "NaN"),
        (b'{"a": -Infinity}', ":1", "Infinity"),
        (b'{"a": 1, "a": 2}', ":1", "occurs twice"),
        (b'"hello"', ":1", "object with columns"),
        (b'[{"a": 1}, 5]', ":1", "object with columns"),
        (b'[{"a": 1} {"a": 2}]', ":1:11", "comma"),
        (b'[{"a": 1}] x', ":1:12", "after the end"),
        (b'[{"a": 1},\n', ":2:1", "Expecting value"),
        (b'[\n{"a": NaN}]', ":2", "NaN"),
        (b'{"a": 1}\n\xff\xfe', "", "at byte 9; it looks like latin-1"),
        (b'\xff\xfe{\x00"\x00', "", "UTF-16"),
        (b"{\x00}\x00", "", "UTF-16"),
        (b"[" * 100_000, ":1:2", "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", ":1", "integer"),
    ],
)
def test_refuses_with_the_place(tmp_path, raw, where, what):
    with pytest.raises(DataError, match=what) as caught:
        rows_of(tmp_path, raw)
    assert caught.value.where.endswith(f"data.jsonl{where}")


def test_tolerates_and_counts_broken_rows(tmp_path):
    raw = b'{"a": \n{"a": 1}\n5\n{"a": NaN}\n{"a": 2}'
    rows, bad_rows = rows_of(tmp_path, raw, allowed=3)
    assert [row.columns["a"] for row in rows] == [1, 2]
    assert len(bad_rows.errors) == 3
    with pytest.raises(DataError):
        rows_of(tmp_path, raw, allowed=2)


def test_all_broken_rows_are_named_up_to_a_number():
    bad_rows = BadRows(1, lists_all=True)
    bad_rows.refuse("odd", "a:1")
    bad_rows.require_within_budget()
    bad_rows.refuse("even", "a:2")
    with pytest.raises(DataError, match="2 rows are broken, and skip_bad_rows") as both:
        bad_rows.require_within_budget()
    assert both.value.where.split() == ["a:1:", "odd", "a:2:", "even"]
    [note] = bad_rows.notes
    assert note == "2 broken rows left out:\n  a:1: odd\n  a:2: even"
    for line in range(3, 10_001):
        bad_rows.refuse("odd", f"a:{line}")
    assert bad_rows.notes[0].endswith("\n  a:10: odd\n  and 9,990 more")
    with pytest.raises(DataError, match="more than 10,000 rows are broken") as many:
        bad_rows.refuse("odd", "a:10001")
    assert many.value.where.endswith("a:10: odd\n         and others")


def test_tolerates_refused_values_inside_an_array(tmp_path):
    rows, bad_rows = rows_of(tmp_path, b'[{"a": NaN}, {"a": 1}]', allowed=1)
    assert [row.columns for row in rows] == [{"a": 1}]
    assert len(bad_rows.errors) == 1


@pytest.mark.parametrize("wrap", [b'{"a": "%s"}\n{"a": 1}', b'[{"a": "%s"}, {"a": 1}]'])
def test_limits_the_size_of_a_row(tmp_path, monkeypatch, wrap):
    for module in (json_rows, opened_file):
        monkeypatch.setattr(module, "MAX_VALUE_BYTES", 100)
    rows, bad_rows = rows_of(tmp_path, wrap % (b"x" * 200), allowed=1)
    assert [row.columns for row in rows] == [{"a": 1}]
    assert "16 MB" in bad_rows.errors[0].what


def test_reports_an_unreadable_file(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        list(read_json_rows(tmp_path / "missing.jsonl", BadRows()))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=60) | st.text('[]{}":,a1\n \\u', max_size=40))
def test_any_bytes_give_rows_or_a_data_error(tmp_path, raw):
    try:
        rows, _ = rows_of(tmp_path, raw if isinstance(raw, bytes) else raw.encode())
    except DataError:
        return
    assert all(isinstance(row.columns, dict) for row in rows)


@settings(
    max_examples=50,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    values=st.lists(
        st.dictionaries(st.text(max_size=5), st.text(max_size=9), min_size=1),
        max_size=4,
    ),
    layout=st.sampled_from(["lines", "array", "pretty", "pretty array"]),
)
def test_every_layout_gives_the_same_rows(tmp_path, values, layout):
    indent = 2 if "pretty" in layout else None
    objects = values if "array" not in layout else [values]
    texts = [json.dumps(v, ensure_ascii=False, indent=indent) for v in objects]
    rows, _ = rows_of(tmp_path, "\n".join(texts).encode())
    assert [row.columns for row in rows] == values
