"""ShareGPT's turns as chat templates read them."""

from pathlib import Path
from typing import Any

import datasets
import pytest

from fastjax import FastLanguageModel, standardize_sharegpt
from fastjax.errors import DataError

SAID = [{"from": "human", "value": "Two?"}, {"from": "gpt", "value": "Four."}]
MESSAGES = [
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "Four."},
]
RULE = {"role": "system", "content": "Be brief."}


def _frame(rows: list[dict]) -> Any:
    pandas = pytest.importorskip("pandas")
    return pandas.DataFrame(rows)


def _said(rows: Any) -> list[dict]:
    """Returns the rows without the keys that Arrow fills with nothing."""
    return [
        row
        | {
            "conversations": [
                {key: value for key, value in turn.items() if value is not None}
                for turn in row["conversations"]
            ]
        }
        for row in rows
    ]


@pytest.mark.parametrize("kind", [list, datasets.Dataset.from_list, _frame])
def test_rows_of_every_kind(kind: Any) -> None:
    rows = [
        {"conversations": SAID, "system": "Be brief.", "id": "a"},
        {"conversations": MESSAGES, "system": None, "id": "b"},
    ]
    done = standardize_sharegpt(kind(rows))
    assert _said(done) == [
        {"conversations": [RULE, *MESSAGES], "id": "a"},
        {"conversations": MESSAGES, "id": "b"},
    ]
    assert _said(standardize_sharegpt(done)) == _said(done)


def test_the_usual_script(small_model: Path) -> None:
    loaded = FastLanguageModel.from_pretrained(str(small_model), dtype="float32")
    tokenizer: Any = loaded[1]
    said = datasets.Dataset.from_list([{"conversations": SAID}])

    def texts(rows: dict[str, list]) -> dict[str, list[str]]:
        return {
            "text": [
                tokenizer.apply_chat_template(
                    turns, tokenize=False, add_generation_prompt=False
                )
                for turns in rows["conversations"]
            ]
        }

    row = standardize_sharegpt(said).map(texts, batched=True)[0]
    assert "Two?" in row["text"]
    assert "Four." in row["text"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": MESSAGES}, "no column 'conversations', only \\['messages'\\]"),
        ({"conversations": "Two?"}, "list of messages, not a str"),
        ({"conversations": [{"from": "nobody", "value": "x"}]}, "'nobody', not one of"),
        ({"conversations": [{"from": "human", "value": 4}]}, "not an int"),
    ],
)
def test_what_is_no_conversation_is_named(row: dict, message: str) -> None:
    good = dict.fromkeys(row, SAID)
    with pytest.raises(DataError, match=message) as caught:
        standardize_sharegpt([{"conversations": None}, row])
    assert caught.value.where == "row 1"
    assert caught.value.fix
    if "messages" in row:
        with pytest.raises(DataError, match=message):
            standardize_sharegpt(datasets.Dataset.from_list([good]))


def test_one_split_is_asked_for() -> None:
    rows = datasets.Dataset.from_list([{"conversations": SAID}])
    with pytest.raises(DataError, match=r"dataset\['train'\]"):
        standardize_sharegpt(datasets.DatasetDict({"train": rows}))
