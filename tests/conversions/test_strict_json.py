"""JSON objects of untrusted files."""

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conversions.strict_json import parse_json_object, read_json_object
from fastjax.errors import FastJaxError, ModelError


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "not valid JSON"),
        (b'{"a": {"b": 1, "b": 2}}', "b appears twice"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b'"x"', "this is str"),
    ],
)
def test_refusals(raw: bytes, reason: str):
    with pytest.raises(ModelError, match=reason) as caught:
        parse_json_object(raw, where="x.json")
    assert caught.value.where == "x.json"
    assert ("download" in caught.value.fix) == (reason != "this is str")


def test_large_and_missing_files_are_refused(tmp_path: Path):
    path = tmp_path / "x.json"
    with pytest.raises(ModelError, match="cannot read"):
        read_json_object(path, limit_bytes=10)
    path.write_text('{"a": "0123456789"}')
    with pytest.raises(ModelError, match="larger than 10 bytes"):
        read_json_object(path, limit_bytes=10)
    assert read_json_object(path, limit_bytes=100) == {"a": "0123456789"}


@given(raw=st.binary(max_size=60))
def test_random_bytes_are_an_object_or_an_error(raw: bytes):
    with contextlib.suppress(FastJaxError):
        assert isinstance(parse_json_object(raw, where="x"), dict)
