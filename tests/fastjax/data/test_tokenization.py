"""Tokens and masks: what is trained, what is cut, and that a row is never untrained."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from fastjax.data import (
    ChatTemplate,
    Completion,
    ExampleTokenizer,
    ResponseMarkers,
    Text,
)
from fastjax.data.bad_rows import BadRows
from fastjax.data.conversation import conversation
from fastjax.data.examples import Segments, Tokens
from fastjax.data.rendering import response_spans
from fastjax.data.tokenization import trained_tokens
from fastjax.errors import ConfigError, DataError, ModelError

EOS = 4
PAIR = Completion(prompt="question one ", completion="answer two", where="row 1")
CHAT = conversation(
    [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yo"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ],
    where="row 1",
)


@pytest.fixture(scope="module")
def tokenizer(fixtures):
    return AutoTokenizer.from_pretrained(fixtures / "tokenizer_v5")


def one(tokenizer, example, **options):
    options.setdefault("max_length", 256)
    [document], _ = ExampleTokenizer(tokenizer, **options).tokenize([example])
    return document


def trained_text(tokenizer, document) -> str:
    return tokenizer.decode(document.input_ids[document.trained])


def test_a_text_ends_with_one_eos_and_is_trained_whole(tokenizer):
    document = one(tokenizer, Text(text="hello world"))
    assert document.input_ids[-1] == EOS
    assert document.trained.all()
    again = one(tokenizer, Text(text="hello world<|eot_id|>"))
    np.testing.assert_array_equal(again.input_ids, document.input_ids)


def test_bos_is_added_once_when_the_tokenizer_adds_it(tokenizer, fixtures):
    from tokenizers.processors import TemplateProcessing

    bos = "<|begin_of_text|>"
    adding = AutoTokenizer.from_pretrained(fixtures / "tokenizer_v5")
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, 0)]
    )
    plain = one(tokenizer, Text(text="hello"))
    assert plain.input_ids[0] != 0
    for text in ("hello", bos + "hello"):
        document = one(adding, Text(text=text))
        assert document.input_ids.tolist() == [0, *plain.input_ids.tolist()]
    for layout in (tokenizer, adding):
        assert one(layout, CHAT).input_ids.tolist().count(0) == 1


def test_only_the_completion_is_trained(tokenizer):
    document = one(tokenizer, PAIR)
    # The token that spans the border is said by the answer.
    assert trained_text(tokenizer, document) == " answer two<|eot_id|>"
    assert one(tokenizer, PAIR, train_on="all").trained.all()


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [
        ("auto", "yo<|eot_id|>a<|eot_id|>"),
        ("assistant", "yo<|eot_id|>a<|eot_id|>"),
        ("last", "a<|eot_id|>"),
    ],
)
def test_turns_that_are_trained(tokenizer, train_on, expected):
    assert trained_text(tokenizer, one(tokenizer, CHAT, train_on=train_on)) == expected
    assert one(tokenizer, CHAT, train_on="all").trained.all()


def test_muted_turns_are_not_trained(tokenizer):
    messages = [dict(message) for message in CHAT.messages]
    messages[1]["train"] = False
    chat = conversation(messages, where="")
    assert trained_text(tokenizer, one(tokenizer, chat)) == "a<|eot_id|>"
    prompted = conversation(messages[3:], prompt=messages[:3], where="")
    document = one(tokenizer, prompted, train_on="completion")
    assert trained_text(tokenizer, document) == "a<|eot_id|>"


@pytest.mark.parametrize(
    ("example", "train_on"),
    [(Text(text="a"), "assistant"), (PAIR, "assistant"), (CHAT, "completion")],
)
def test_train_on_must_suit_the_data(tokenizer, example, train_on):
    with pytest.raises(ConfigError, match="does not suit"):
        one(tokenizer, example, train_on=train_on)


def test_markers_choose_the_responses(tokenizer):
    markers = ResponseMarkers(
        instruction_part="<|start_header_id|>user<|end_header_id|>\n\n",
        response_part="<|start_header_id|>assistant<|end_header_id|>\n\n",
    )
    document = one(tokenizer, CHAT, markers=markers)
    np.testing.assert_array_equal(document.trained, one(tokenizer, CHAT).trained)
    text = Text(text="Q: hi A: yo Q: q A: a")
    markers = ResponseMarkers(instruction_part="Q:", response_part="A:")
    document = one(tokenizer, text, markers=markers)
    assert trained_text(tokenizer, document) == " yo  a<|eot_id|>"
    with pytest.raises(DataError, match="nothing after 'A:'"):
        one(tokenizer, Text(text="no marker here"), markers=markers)
    with pytest.raises(ConfigError, match="must not be empty"):
        ResponseMarkers(instruction_part="", response_part="A:")


def test_response_spans_ignore_a_marker_inside_a_response():
    markers = ResponseMarkers(instruction_part="<u>", response_part="<a>")
    text = "<u>1<a>2<a>3<u>4<a>"
    assert [text[a:b] for a, b in response_spans(text, markers)] == ["2<a>3", ""]


def test_tokens_that_share_a_character_with_a_span_are_trained():
    offsets = [(0, 0), (0, 2), (2, 5), (5, 6), (5, 6), (6, 9)]
    expected = [False, False, True, True, True, False]
    assert trained_tokens(offsets, [(3, 6)]) == expected
    assert trained_tokens(offsets, [(0, 1), (8, 9)]) == [
        False,
        True,
        *[False] * 3,
        True,
    ]
    assert trained_tokens(offsets, [(2, 2)]) == [False] * 6


def test_a_cut_keeps_something_to_train(tokenizer):
    whole = one(tokenizer, PAIR)
    prompt = int(np.flatnonzero(whole.trained)[0])
    cut = one(tokenizer, PAIR, max_length=prompt + 1)
    assert len(cut) == prompt + 1
    assert cut.trained_tokens == 1
    make = ExampleTokenizer(tokenizer, max_length=prompt)
    with pytest.raises(DataError, match="only after the first max_length"):
        make.tokenize([PAIR])
    documents, report = make.tokenize([PAIR, Text(text="hi")])
    assert (len(documents), report.rows) == (1, 1)
    assert (report.dropped_untrained, report.cut_to_nothing) == (1, 1)


def test_overlong_rows_can_be_dropped_or_refused(tokenizer):
    rows = [Text(text="hi"), Text(text="word " * 50, where="data.jsonl:2")]
    make = ExampleTokenizer(tokenizer, max_length=20, overlong="drop")
    documents, report = make.tokenize(rows)
    assert (len(documents), report.dropped_overlong) == (1, 1)
    with pytest.raises(DataError, match="1 row is longer than 20"):
        make.tokenize(rows[1:])
    with pytest.raises(DataError, match="longer than max_length=20") as caught:
        ExampleTokenizer(tokenizer, max_length=20, overlong="error").tokenize(rows)
    assert caught.value.where == "data.jsonl:2"


def test_a_split_keeps_every_target(tokenizer):
    whole = one(tokenizer, PAIR)
    make = ExampleTokenizer(tokenizer, max_length=7, overlong="split")
    documents, report = make.tokenize([PAIR])
    assert report.trained_tokens == whole.trained_tokens
    targets = [d.input_ids[1:][d.trained[1:]] for d in documents]
    expected = whole.input_ids[1:][whole.trained[1:]]
    np.testing.assert_array_equal(np.concatenate(targets), expected)
    assert max(map(len, documents)) <= 7
    assert set(documents.rows) == {0}


def test_rows_that_the_template_refuses_are_broken_rows(tokenizer):
    refused = conversation([{"role": "tool", "content": "1"}], where="data.jsonl:7")
    make = ExampleTokenizer(
        tokenizer,
        max_length=99,
        template=lambda: ChatTemplate(tokenizer, path="llama-3"),
    )
    with pytest.raises(DataError, match="no tool calls"):
        make.tokenize([CHAT, refused])
    bad_rows = BadRows(1)
    documents, report = make.tokenize([CHAT, refused], bad_rows=bad_rows)
    assert (len(documents), report.refused) == (1, 1)
    assert bad_rows.errors[0].where == "data.jsonl:7"


def test_control_tokens_in_messages_can_be_refused(tokenizer):
    evil = conversation(
        [
            {"role": "user", "content": "<|eot_id|>"},
            {"role": "assistant", "content": "a"},
        ],
        where="row 3",
    )
    make = ExampleTokenizer(tokenizer, max_length=99, special_tokens="error")
    with pytest.raises(DataError, match="control tokens") as caught:
        make.tokenize([evil])
    assert caught.value.where == "row 3"


def test_segments_and_tokens_are_taken_as_they_are(tokenizer):
    pieces = Segments(pieces=(("question ", False), ("answer", True), ("!", False)))
    document = one(tokenizer, pieces)
    assert tokenizer.decode(document.input_ids) == "question answer!"
    assert trained_text(tokenizer, document).strip() == "answer"
    tokens = Tokens(input_ids=(9, 8, 7), trained=(False, False, True))
    document = one(tokenizer, tokens)
    assert document.input_ids.tolist() == [9, 8, 7]
    assert document.trained.tolist() == [False, False, True]


def test_fixture_longer_than_a_row_is_all_masked(tokenizer, fixtures):
    from fastjax.data import load_examples

    rows = load_examples(fixtures / "bad_data" / "too_long.jsonl").examples
    with pytest.raises(DataError, match="no token of any row would be trained"):
        ExampleTokenizer(tokenizer, max_length=64).tokenize(rows)


def test_a_lone_first_token_is_no_target(tokenizer):
    with pytest.raises(DataError, match="no token"):
        one(tokenizer, Completion(prompt="", completion="<|eot_id|>"))


def test_ids_outside_the_embedding_are_refused(tokenizer):
    with pytest.raises(DataError, match="outside the embedding, which has 50 rows"):
        one(tokenizer, PAIR, vocab_size=50)


def test_the_report_counts(tokenizer, fixtures):
    from fastjax.data import load_examples

    make = ExampleTokenizer(tokenizer, max_length=40)
    documents, report = make.tokenize([PAIR, Text(text="word " * 50)])
    assert report.tokens == sum(len(document) for document in documents)
    trained = sum(document.trained_tokens for document in documents)
    assert report.trained_tokens == trained
    assert (report.truncated, report.split, report.rows) == (0, 1, 4)
    assert report.length_max > report.max_length
    assert "1 row split at 40 tokens" in str(report)
    assert sum(count for _, count in report.histogram) == 2
    assert report.as_json()["trained_share"] == report.trained_share
    evil = fixtures / "bad_data" / "special_tokens_in_text.jsonl"
    _, report = make.tokenize(load_examples(evil).examples)
    assert any("control tokens" in note for note in report.notes)


def test_a_slow_tokenizer_is_refused(tokenizer):
    class Slow:
        is_fast = False
        name_or_path = "slow"

    with pytest.raises(ModelError, match="offsets"):
        ExampleTokenizer.__init__.__wrapped__(None, Slow(), max_length=8)
