"""Files, folders, formats: every fixture is accepted or refused by a written table."""

import itertools
import json
import logging
import re
from pathlib import Path

import datasets
import pandas
import pytest

from fastjax.config import DataFormat, choices
from fastjax.data import ReadOptions, load_examples
from fastjax.data.bad_rows import BadRows
from fastjax.data.conversation import RowFault, conversation
from fastjax.data.examples import Completion, Conversation, Text
from fastjax.data.files import data_files, eval_files
from fastjax.data.sources import ExampleStream
from fastjax.errors import ConfigError, DataError

ACCEPTED = {
    "alpaca.jsonl": (1, "alpaca"),
    "array_in_jsonl.jsonl": (1, "text"),
    "blank_lines.jsonl": (2, "text"),
    "bom.jsonl": (1, "text"),
    "control.jsonl": (1, "text"),
    "crlf.jsonl": (2, "text"),
    "null.jsonl": (1, "text"),  # The null row is left out and noted.
    "sharegpt.jsonl": (1, "sharegpt"),
    "special_tokens_in_text.jsonl": (1, "messages"),
    "system_last.jsonl": (1, "messages"),
    "too_long.jsonl": (1, "prompt_completion"),
    "two_users.jsonl": (1, "messages"),
}
REFUSED = {
    "bad_line.jsonl": r"bad_line.jsonl:2:10",
    "content_not_str.jsonl": r"messages\[0\].content must be a string",
    "empty.jsonl": "nothing to train on",
    "empty_content.jsonl": "nothing to train on",
    "empty_messages.jsonl": "messages is an empty list",
    "latin1.jsonl": "not UTF-8 at byte 12; it looks like latin-1",
    "nan.jsonl": "NaN is not a JSON number",
    "not_parquet.parquet": "not whole Parquet data",
    "preference_same.jsonl": "preference pairs",
    "scalar.jsonl": "a row must be an object",
    "unknown_role.jsonl": "'alien'",
}


def test_the_table_names_every_fixture(fixtures):
    files = {path.name for path in (fixtures / "bad_data").iterdir()}
    assert files == set(ACCEPTED) | set(REFUSED)


@pytest.mark.parametrize("name", ACCEPTED)
def test_fixture_is_accepted(fixtures, name):
    loaded = load_examples(fixtures / "bad_data" / name)
    assert (len(loaded.examples), loaded.data_format) == ACCEPTED[name]


@pytest.mark.parametrize("name", REFUSED)
def test_fixture_is_refused(fixtures, name):
    with pytest.raises(DataError, match=REFUSED[name]) as caught:
        load_examples(fixtures / "bad_data" / name)
    assert name in caught.value.where


def test_rows_left_out_are_noted(fixtures):
    folder = fixtures / "bad_data"
    assert "1 row left out" in load_examples(folder / "null.jsonl").notes[0]
    loaded = load_examples(folder / "bad_line.jsonl", skip_bad_rows=1)
    assert len(loaded.examples) == 2
    assert "bad_line.jsonl:2:10" in loaded.notes[0]


def test_there_is_an_example_of_every_format():
    folder, shown = Path(__file__).parents[3] / "examples" / "data", set()
    for path in folder.iterdir():
        loaded = load_examples(path)
        assert len(loaded.examples) >= 2
        assert path.name.startswith(loaded.data_format)
        shown.add(loaded.data_format)
    assert shown == set(choices(DataFormat)) - {"auto"}


def test_formats_become_examples():
    text = load_examples([{"text": "a"}]).examples
    assert text == [Text(text="a", where="row 1")]
    pair = load_examples([{"prompt": "p", "completion": "c"}]).examples
    assert pair == [Completion(prompt="p", completion="c", where="row 1")]
    turns = [{"role": "user", "content": "u"}], [{"role": "assistant", "content": "a"}]
    rows = [{"prompt": turns[0], "completion": turns[1]}]
    chat = load_examples(rows).examples[0]
    assert isinstance(chat, Conversation)
    assert [message["content"] for message in chat.messages] == ["u", "a"]
    rows = [{"instruction": "add", "input": "1 2", "output": "3"}]
    example = load_examples(rows).examples[0]
    assert isinstance(example, Completion)
    assert example.completion == "3"
    assert example.prompt.endswith(
        "### Instruction:\nadd\n\n### Input:\n1 2\n\n### Response:\n"
    )


def test_columns_can_be_renamed():
    rows = [{"question": "q", "answer": "a", "id": 7}]
    names = ("question=prompt", "answer=completion")
    loaded = load_examples(rows, ReadOptions(column_map=names))
    assert loaded.data_format == "prompt_completion"
    assert loaded.notes == ("columns not used: id",)
    joined = ReadOptions(column_map=(",".join(names),))
    assert load_examples(rows, joined).examples == loaded.examples
    with pytest.raises(ConfigError, match="nearest: question"):
        load_examples(rows, ReadOptions(column_map=("questoin=prompt",)))
    with pytest.raises(ConfigError, match="exists already"):
        load_examples(rows, ReadOptions(column_map=("question=answer",)))
    with pytest.raises(ConfigError, match="old=new"):
        load_examples(rows, ReadOptions(column_map=("question",)))


def test_a_text_column_wins_over_alpaca_and_says_so():
    rows = [{"instruction": "i", "output": "o", "text": "t"}]
    loaded = load_examples(rows)
    assert loaded.data_format == "text"
    assert "alpaca" in loaded.notes[0]
    alpaca = ReadOptions(data_format="alpaca")
    assert load_examples(rows, alpaca).data_format == "alpaca"


@pytest.mark.parametrize("field", ["text", "body"])
def test_a_text_field_that_is_named_is_read_before_all_others(field: str):
    rows = [{"messages": [{"role": "user", "content": "q"}], field: "rendered"}]
    loaded = load_examples(rows, ReadOptions(text_field=field))
    assert loaded.data_format == "text"
    assert loaded.examples[0].text == "rendered"
    assert loaded.notes == ("columns not used: messages",)


def test_a_text_field_that_is_no_column_is_an_error():
    rows = [{"prompt": "p", "completion": "c"}]
    with pytest.raises(ConfigError, match="dataset_text_field='body'") as caught:
        load_examples(rows, ReadOptions(text_field="body"))
    assert caught.value.fix.startswith("the columns are prompt, completion")


def test_unknown_columns_show_the_nearest_formats():
    with pytest.raises(DataError, match="promt, completion") as caught:
        load_examples([{"promt": "a", "completion": "b"}])
    assert caught.value.fix.startswith("nearest formats: prompt_completion")
    with pytest.raises(DataError, match="question, answer") as caught:
        load_examples([{"question": "a", "answer": "b"}])
    assert "question=prompt,answer=completion" in caught.value.fix


def test_first_odd_row_is_named():
    rows = [{"text": "a"}, {"prompt": "p", "completion": "c"}]
    with pytest.raises(DataError, match="lacks text") as caught:
        load_examples(rows)
    assert caught.value.where == "row 2"
    with pytest.raises(DataError, match="surrogate"):
        load_examples([{"text": "\ud800"}])
    with pytest.raises(DataError, match="must be a string, not a list"):
        load_examples([{"text": ["a"]}])


def test_objects_that_are_not_rows():
    with pytest.raises(DataError, match="dataset\\['train'\\]"):
        load_examples({"train": [{"text": "a"}]})
    with pytest.raises(DataError, match="not an int"):
        load_examples([1, 2])


def test_a_datasets_dataset_is_a_source():
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list([{"text": "a"}, {"text": None}])
    assert [e.text for e in load_examples(dataset).examples] == ["a"]


def test_a_dataframe_is_a_source(tmp_path: Path):
    rows = [
        {"prompt": "one", "completion": "two"},
        {"prompt": "lost", "completion": None},
    ]
    found = load_examples(pandas.DataFrame(rows))
    assert [type(example) for example in found.examples] == [Completion]
    assert "1 row left out: null or empty" in found.notes
    conversations = [{"messages": [{"role": "user", "content": "hi"}]}]
    file = tmp_path / "rows.parquet"
    pandas.DataFrame(conversations).to_parquet(file)  # Read back as NumPy arrays.
    (example,) = load_examples(pandas.read_parquet(file)).examples
    assert isinstance(example, Conversation)


def test_cells_of_a_dataframe_are_plain(tmp_path: Path):
    texts = pandas.array(["a", None], dtype="string")  # Holds NA, which is not NaN.
    found = load_examples(pandas.DataFrame({"text": texts}))
    assert [example.text for example in found.examples] == ["a"]
    assert "1 row left out: null or empty" in found.notes
    parts = [{"type": "text", "text": "hi"}]
    rows = [{"messages": [{"role": "user", "content": parts}]}]
    file = tmp_path / "rows.parquet"
    pandas.DataFrame(rows).to_parquet(file)  # Arrays within arrays.
    assert (
        load_examples(pandas.read_parquet(file)).examples
        == load_examples(rows).examples
    )


def test_columns_of_one_name_are_refused():
    frame = pandas.DataFrame([["a", "b"]], columns=["text", "text"])
    with pytest.raises(DataError, match="columns of one name: text"):
        load_examples(frame)


def test_folders_globs_and_lists(tmp_path):
    for name in ("train-2.jsonl", "train-1.jsonl", "validation.json", "notes.md"):
        (tmp_path / name).write_text(json.dumps({"text": name}))
    names = [path.name for path in data_files(tmp_path)]
    assert names == ["train-1.jsonl", "train-2.jsonl"]
    assert [p.name for p in eval_files(tmp_path)] == ["validation.json"]
    found = load_examples(str(tmp_path / "train-*.jsonl")).examples
    assert [example.text for example in found] == ["train-1.jsonl", "train-2.jsonl"]
    listed = [tmp_path / "validation.json", tmp_path / "train-1.jsonl"]
    found = load_examples(listed).examples
    assert [example.text for example in found] == ["validation.json", "train-1.jsonl"]


def test_missing_files_show_their_neighbours(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}')
    for wrong, near in [
        ("trian.jsonl", "train.jsonl"),
        ("*.csv", "train.jsonl"),
        ("no/where", "its folder does not exist"),
    ]:
        with pytest.raises(DataError, match=near):
            load_examples(tmp_path / wrong)
    with pytest.raises(DataError, match=re.escape("it holds: train.jsonl")):
        data_files(tmp_path, split="test")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="it holds: nothing"):
        load_examples(tmp_path / "empty")


def test_an_offline_hub_is_a_data_error():
    with pytest.raises(DataError, match="hub cannot be reached"):
        load_examples("nobody-at-all/no-such-data-set")


def test_a_connection_that_breaks_on_the_way_is_told_as_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    retries = logging.getLogger("huggingface_hub.utils._http")
    before = retries.level

    def rows():
        yield {"text": "one"}
        assert retries.level == before
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows())
    with pytest.raises(DataError, match="the rows end early: reset by peer") as caught:
        load_examples("owner/name")
    assert caught.value.where == "owner/name, after row 1"


@pytest.mark.parametrize(
    ("broken", "what", "where"),
    [
        ({0}, "text must be a string", "row 1"),
        ({0, 9}, "at least 2 rows", "10,000 fur"),
    ],
)
def test_broken_rows_are_sought_for_a_while(
    broken: set[int], what: str, where: str
) -> None:
    endless = ({"text": 5 if n in broken else "a"} for n in itertools.count())
    stream = ExampleStream(endless, ReadOptions(), BadRows(lists_all=True))
    with pytest.raises(DataError, match=what) as caught:
        list(stream)
    assert where in caught.value.where


USER, ANSWER = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    "messages",
    [
        [USER, ANSWER],
        [USER, USER, ANSWER],
        [ANSWER, USER],
        [USER, ANSWER, {"role": "system", "content": "s"}],
        [{"role": "user", "content": ""}, ANSWER],
        [{"role": "user", "content": [{"type": "text", "text": "u"}]}, ANSWER],
        [USER, {"role": "assistant", "content": None, "tool_calls": [
            {"function": {"name": "f", "arguments": '{"x": 1}'}}]}],
        [USER, {"role": "assistant", "content": "", "tool_calls": [
            {"function": {"name": "f", "arguments": {"x": 1}}}]},
         {"role": "tool", "content": "1", "tool_call_id": "c"}, ANSWER],
    ],
)  # fmt: skip
def test_messages_are_accepted(messages):
    chat = conversation(messages, where="row 1")
    assert len(chat.messages) == len(messages)
    for message in chat.messages:
        for call in message.get("tool_calls", []):
            assert call["function"]["arguments"] == {"x": 1}


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ([], "empty list"),
        ("hello", "must be a list"),
        (["hello"], "must be an object"),
        ([{"role": "human", "content": "u"}], "did you mean 'user'"),
        ([{"role": None, "content": "u"}], "role is 'None'"),
        ([{"content": "u"}], "not one of"),
        ([{"role": "user"}], "content must be a string, not null"),
        ([{"role": "user", "content": 5}], "not an int"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "images are not"),
        ([{"role": "user", "content": ["u"]}], "object with a type"),
        ([{**ANSWER, "tool_calls": [{"name": "f"}]}], "with a function"),
        ([{**ANSWER, "tool_calls": [
            {"function": {"name": "f", "arguments": "{"}}]}], "not valid JSON"),
        ([{**ANSWER, "weight": 0.5}], "weight must be 0 or 1"),
        ([USER] * 2001, "limit is 2000"),
    ],
)  # fmt: skip
def test_messages_are_refused(messages, what):
    with pytest.raises(RowFault, match=what):
        conversation(messages, where="row 1")


def test_turns_can_be_read_without_being_trained():
    muted = [{**ANSWER, "train": False}, {**ANSWER, "weight": 0}, ANSWER]
    assert conversation(muted, where="").muted == {0, 1}
    chat = conversation([ANSWER], prompt=[USER, ANSWER], where="")
    assert chat.muted == {1}
