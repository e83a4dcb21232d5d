"""Kinds of files: each gives the same rows, from any place, and names its faults."""

import bz2
import gzip
import json
import lzma

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastjax.data import ReadOptions, load_examples, opened_file
from fastjax.data.bad_rows import BadRows
from fastjax.data.files import data_files, read_rows
from fastjax.errors import DataError

ROWS = [{"prompt": f'q{i}, "x"\nline', "completion": f"a{i} é"} for i in range(7)]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def csv_text(separator: str) -> bytes:
    quoted = [
        [f'"{v.replace(chr(34), chr(34) * 2)}"' for v in r.values()] for r in ROWS
    ]
    lines = [separator.join(fields) for fields in [["prompt", "completion"], *quoted]]
    return ("\r\n".join(lines) + "\r\n").encode()


def write_arrow(path, new) -> None:
    table = pa.Table.from_pylist(ROWS)
    with new(str(path), table.schema) as file:
        file.write_table(table, max_chunksize=3)


def zstd(path, raw: bytes) -> None:
    with pa.CompressedOutputStream(str(path), "zstd") as file:
        file.write(raw)


WRITERS = {
    "a.jsonl": lambda path: path.write_bytes(JSONL),
    "a.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "a.csv": lambda path: path.write_bytes(csv_text(",")),
    "b.csv": lambda path: path.write_bytes(csv_text(";")),
    "a.tsv": lambda path: path.write_bytes(csv_text("\t")),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(JSONL)),
    "a.csv.bz2": lambda path: path.write_bytes(bz2.compress(csv_text(","))),
    "a.jsonl.xz": lambda path: path.write_bytes(lzma.compress(JSONL)),
    "a.jsonl.zst": lambda path: zstd(path, JSONL),
    "a.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
    "a.arrow": lambda path: write_arrow(path, pa.ipc.new_file),
    "b.arrow": lambda path: write_arrow(path, pa.ipc.new_stream),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_gives_the_same_rows(tmp_path, name):
    path = tmp_path / name
    WRITERS[name](path)
    rows = list(read_rows(path, BadRows()))
    assert [row.columns for row in rows] == ROWS
    assert all(row.where.startswith(str(path)) for row in rows)


def test_a_text_file_is_one_text_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("fastjax.data.text_rows._PIECE_CHARACTERS", 10)
    (tmp_path / "book.txt").write_bytes(b"first line\r\nsecond\n\nthird line here\n")
    [*head, last] = load_examples(tmp_path / "book.txt").examples
    texts = [piece.text for piece in [*head, last]]
    assert "".join(texts) == "first line\nsecond\n\nthird line here\n"
    assert (head[0].is_start, last.is_start) == (True, False)
    assert (head[0].is_end, last.is_end) == (False, True)
    assert last.where.endswith("book.txt:2")


def test_csv_faults_name_the_line(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\n"a\nb",c\nd\n"e"x,f\n"g",h\n')
    with pytest.raises(DataError, match="1 fields, the first line 2") as caught:
        load_examples(path)
    assert caught.value.where == f"{path}:4"
    loaded = load_examples(path, skip_bad_rows=2)
    assert [e.completion for e in loaded.examples] == ["c", "h"]
    path.write_text("a,a\n1,2\n")
    with pytest.raises(DataError, match="'a' occurs twice"):
        load_examples(path)


@pytest.mark.parametrize(
    "name", ["a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst", "a.csv.bz2"]
)
def test_cut_and_foreign_archives_are_data_errors(tmp_path, name):
    path = tmp_path / name
    WRITERS[name](path)
    whole = path.read_bytes()
    for raw in (whole[: len(whole) // 2], b"nothing of the kind", b""):
        path.write_bytes(raw)
        with pytest.raises(DataError) as caught:
            load_examples(path)
        assert name in caught.value.where


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "b.arrow"])
def test_damaged_tables_are_data_errors(tmp_path, name):
    path = tmp_path / name
    WRITERS[name](path)
    whole = path.read_bytes()
    for raw in (whole[: len(whole) // 2], whole[:9], b""):
        path.write_bytes(raw)
        with pytest.raises(DataError):
            load_examples(path)


def test_a_bomb_is_refused(tmp_path):
    path = tmp_path / "bomb.jsonl.gz"
    line = b'{"text": "' + b"a" * 2**20 + b'"}\n'
    path.write_bytes(gzip.compress(line * 80))
    with pytest.raises(DataError, match="more than 200 times its size") as caught:
        for _ in read_rows(path, BadRows()):
            pass
    assert caught.value.code == "FJ-DATA-BOMB"


def test_a_bomb_of_one_array_is_not_read_to_its_end(tmp_path, monkeypatch):
    read = 0

    class Counting(gzip.GzipFile):
        def read(self, size=-1):
            nonlocal read
            raw = super().read(size)
            read += len(raw)
            return raw

    monkeypatch.setitem(opened_file.DECOMPRESSORS, ".gz", Counting)
    path = tmp_path / "bomb.json.gz"
    path.write_bytes(gzip.compress(b"[" + b" " * 2**28))
    with pytest.raises(DataError, match="more than 200 times its size"):
        list(read_rows(path, BadRows()))
    assert read < 2**27


@pytest.mark.parametrize(
    "name", ["x" * 300, "x" * 300 + "*", "a/" * 3000, "~" + "x" * 300]
)
def test_names_that_no_file_can_have_are_data_errors(name):
    with pytest.raises(DataError, match=r"no such file|no file matches"):
        load_examples(name)


def test_folders_prefer_rows_and_know_split_folders(tmp_path):
    (tmp_path / "README.txt").write_text("words")
    assert data_files(tmp_path)[0].name == "README.txt"
    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress(csv_text(",")))
    assert [path.name for path in data_files(tmp_path)] == ["rows.csv.gz"]
    (tmp_path / "train").mkdir()
    write_arrow(tmp_path / "train" / "data-0.arrow", pa.ipc.new_stream)
    assert [path.name for path in data_files(tmp_path)] == ["data-0.arrow"]
    (tmp_path / "rows.parquet.gz").touch()
    with pytest.raises(DataError, match=r"'.parquet.gz' are not read"):
        data_files(tmp_path / "rows.parquet.gz")


def test_sharegpt_and_the_other_formats():
    turns = [
        {"from": "human", "value": "u"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "1"},
        {"from": "gpt", "value": "a", "weight": 0},
        {"role": "assistant", "content": "b"},
    ]
    [chat] = load_examples([{"conversations": turns, "system": "s"}]).examples
    roles = [message["role"] for message in chat.messages]
    assert roles == ["system", "user", "assistant", "tool", "assistant", "assistant"]
    assert chat.messages[2]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert chat.muted == {4}
    history = {"instruction": "i", "output": "o", "history": [["q", "a"]]}
    [example] = load_examples([history]).examples
    assert "### Instruction:\nq\n\n### Response:\na\n\n### Inst" in example.prompt
    segments = {
        "segments": [{"label": False, "text": "q"}, {"label": True, "text": "a"}]
    }
    assert load_examples([segments]).examples[0].pieces == (("q", False), ("a", True))
    tokens = {
        "input_ids": [3, 4, 0],
        "labels": [-100, 4, 0],
        "attention_mask": [1, 1, 0],
    }
    [example] = load_examples([tokens]).examples
    assert (example.input_ids, example.trained) == ((3, 4), (False, True))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(
            ["from", "value", "role", "content", "label", "text", "type", "train",
             "weight", "tool_calls", "function", "name", "arguments"]
        ),
        inner,
        max_size=3,
    ),
    max_leaves=6,
)  # fmt: skip
COLUMNS = st.sampled_from(
    ["text", "prompt", "completion", "messages", "tools", "conversations", "system",
     "instruction", "input", "output", "history", "segments", "input_ids", "labels",
     "attention_mask", "chosen"]
)  # fmt: skip


@given(rows=st.lists(st.dictionaries(COLUMNS, JSON, max_size=3), max_size=2))
def test_any_rows_give_examples_or_a_data_error(rows):
    try:
        load_examples(rows, ReadOptions())
    except DataError:
        return


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    raw=st.binary(max_size=60) | st.text('",;\t\r\nab|', max_size=40).map(str.encode),
    name=st.sampled_from(
        ["a.csv", "a.tsv", "a.txt", "a.jsonl.gz", "a.arrow", "a.jsonl"]
    ),
)
def test_any_bytes_give_rows_or_a_data_error(tmp_path, raw, name):
    path = tmp_path / name
    path.write_bytes(raw)
    try:
        rows = list(read_rows(path, BadRows()))
    except DataError:
        return
    assert all(isinstance(row.columns, dict) for row in rows)


def test_parquet_keeps_nested_messages(tmp_path):
    turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    table = pa.Table.from_pylist([{"messages": turns}, {"messages": None}])
    pq.write_table(table, tmp_path / "chat.parquet")
    loaded = load_examples(tmp_path / "chat.parquet")
    assert loaded.notes == ("1 row left out: null or empty",)
    assert [m["content"] for m in loaded.examples[0].messages] == ["u", "a"]
    assert np.ndim(loaded.examples) == 1
