"""The strict safetensors reader and the streaming writer."""

import json
import os
import stat
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from conversions.safetensors_file import SafetensorsFile
from conversions.safetensors_header import DTYPES, TensorSpec, parse_header
from conversions.safetensors_writer import safetensors_writer, write_safetensors
from fastjax.errors import FastJaxError, ModelError, StorageError

REASONS = {
    "empty": "too few",
    "short7": "too few",
    "hdrlen_gt_file": "truncated: the header",
    "hdrlen_200mb": "at most 100000000",
    "not_json": "not valid JSON",
    "truncated": "truncated: 89 bytes are expected, it has 81",
    "overlap": "overlaps",
    "shape_mismatch": "needs",
    "dtype_unknown": "known are",
    "metadata_not_str": "__metadata__",
    "pathlike_name": "looks like a path",
    "html_page": "web page",
}


def write_raw(path: Path, entries: object, data: bytes = b"") -> Path:
    raw = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(dtype: str, shape: list, begin: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("name", REASONS)
def test_hostile_files_are_refused(fixtures: Path, name: str):
    path = fixtures / "bad_safetensors" / f"{name}.safetensors"
    tracemalloc.start()
    with pytest.raises(ModelError) as caught:
        SafetensorsFile(path)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert REASONS[name] in caught.value.what
    assert caught.value.where == str(path)
    assert peak_bytes < 1_000_000


@pytest.mark.parametrize("length", [0x280, 0x480, 0x10280])
def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path, length: int):
    raw = json.dumps({"x": entry("U8", [1], 0, 1)}).encode().ljust(length)
    path = write_raw(tmp_path / "x.safetensors", raw, b"\7")
    assert SafetensorsFile(path).read("x").tolist() == [7]


def test_every_hostile_file_is_covered(fixtures: Path):
    listed = json.loads((fixtures / "bad_safetensors" / "expected.json").read_text())
    assert set(listed) == {*REASONS, "nan_weights"}


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        (b'{"a": 1, "a": 2}', "appears twice"),
        (b"[]", "object"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": NaN}', "NaN"),
        (b"9" * 5000, "not valid JSON"),
        ({"a\u202eb": entry("F32", [], 0, 4)}, "control"),
        ({"": entry("F32", [], 0, 4)}, "unknown tensor name"),
        ({"a": {"dtype": "F32", "shape": []}}, "data_offsets"),
        ({"a": entry("F32", [True], 0, 4)}, "integers"),
        ({"a": entry("F32", [0, 2**40], 0, 0)}, "2**31"),
        ({"a": entry("F32", [1] * 9, 0, 4)}, "at most 8"),
        ({"a": entry("F32", [-1], 0, 4)}, "integers"),
        ({"a": entry("F32", [1], 4, 0)}, "bytes"),
        ({"a": entry("F32", [1], 0, 4.0)}, "two integers"),
        ({"a": entry("F8_E5M2", [4], 0, 4)}, "FP8"),
        ({"a": entry("F32", [2**30, 2**30], 0, 2**62)}, "truncated"),
        ({"a": entry("U8", [2], 2, 4)}, "hole"),
        ({"a": entry("U8", [2], 0, 2)}, "follow the last tensor"),
    ],
)
def test_hostile_headers_are_refused(tmp_path: Path, entries, reason):
    path = write_raw(tmp_path / "x.safetensors", entries, b"1234")
    with pytest.raises(ModelError, match=reason.replace("*", r"\*")):
        SafetensorsFile(path)


def test_pointer_of_git_lfs_is_recognised(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ModelError, match="git-lfs pointer"):
        SafetensorsFile(path)


def test_missing_file_is_a_model_error(tmp_path: Path):
    with pytest.raises(ModelError, match="cannot read"):
        SafetensorsFile(tmp_path / "nope.safetensors")


@given(raw=st.binary(max_size=200), data_bytes=st.integers(0, 100))
def test_random_bytes_end_in_an_error(raw: bytes, data_bytes: int):
    with pytest.raises(FastJaxError):
        parse_header(raw + b"x", data_bytes=data_bytes, where="x")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from([*DTYPES, "F8_E5M2"])
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["dtype", "shape", "data_offsets"]) | st.text(max_size=3),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(entries=st.dictionaries(st.text(max_size=8), JSON, max_size=4))
def test_random_headers_parse_or_are_refused(entries: dict):
    raw = json.dumps(entries).encode()
    try:
        specs, _ = parse_header(raw, data_bytes=8, where="x")
    except FastJaxError:
        return
    assert sum(spec.nbytes for spec in specs.values()) == 8


def test_writer_writes_the_bytes_of_the_safetensors_library(
    tmp_path: Path, fixtures: Path
):
    source = fixtures / "tiny_llama3" / "model.safetensors"
    file = SafetensorsFile(source)
    write_safetensors(
        tmp_path / "x.safetensors", {n: file.read(n) for n in file.tensors}
    )
    assert (tmp_path / "x.safetensors").read_bytes() == source.read_bytes()


def test_every_dtype_survives_the_round_trip(tmp_path: Path):
    tensors = {
        name: np.arange(6).reshape(2, 3).astype(dtype)
        for name, dtype in DTYPES.items()
        if name != "F8_E4M3"  # the library's reader for NumPy has none
    }
    tensors |= {"scalar": np.float32(3)[...], "none": np.empty((0, 2), np.float32)}
    path = tmp_path / "x.safetensors"
    write_safetensors(path, tensors)
    file = SafetensorsFile(path)
    for name, expected in tensors.items():
        actual = file.read(name)
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        assert actual.tobytes() == expected.tobytes()
        assert not actual.flags.writeable or not actual.size
    library = safetensors.numpy.load_file(path)
    assert library["BF16"].dtype == ml_dtypes.bfloat16
    assert set(library) == set(tensors)


def test_unaligned_files_of_other_writers_can_be_read(tmp_path: Path):
    data = np.asarray([1.5, -2.0], np.float32)
    path = write_raw(
        tmp_path / "x.safetensors", {"abc": entry("F32", [2], 0, 8)}, data.tobytes()
    )
    np.testing.assert_array_equal(SafetensorsFile(path).read("abc"), data)


def test_permissions_follow_the_umask(tmp_path: Path):
    before = os.umask(0o022)
    try:
        write_safetensors(tmp_path / "x", {"a": np.zeros(3, np.float32)})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o644


def test_failed_write_keeps_the_old_file(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    path.write_text("old")
    spec = TensorSpec(np.dtype(np.float32), (2,))
    with (
        pytest.raises(ValueError, match="lacks tensors"),
        safetensors_writer(path, {"a": spec, "b": spec}) as put,
    ):
        put("a", np.zeros(2, np.float32))
    with (
        pytest.raises(ValueError, match="has a place"),
        safetensors_writer(path, {"a": spec}) as put,
    ):
        put("a", np.zeros(3, np.float32))
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_unwritable_place_is_a_storage_error(tmp_path: Path):
    with pytest.raises(StorageError, match="cannot write"):
        write_safetensors(tmp_path / "no" / "x", {"a": np.zeros(3, np.float32)})
