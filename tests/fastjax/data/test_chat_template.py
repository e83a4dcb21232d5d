"""Chat templates: masks equal the recorded ones, hostile templates are stopped."""

import json
import re

import pytest
from transformers import AutoTokenizer

from fastjax.data import (
    BUILTIN_TEMPLATES,
    ChatTemplate,
    Conversation,
    ExampleTokenizer,
    get_chat_template,
)
from fastjax.data.chat_template import LAST_TURN_NOTE, fitting_templates
from fastjax.data.conversation import conversation
from fastjax.errors import ConfigError, DataError, ModelError

LAYOUTS = ("tokenizer_v5", "tokenizer_v4", "tokenizer_v4_inline")
CHAT = conversation(
    [
        {"role": "system", "content": "sys"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yo"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ],
    where="row 1",
)
# Earlier turns are shown shortened, as templates do that drop earlier thoughts.
UNSTABLE = (
    "{% for m in messages %}[{{ m.role }}]"
    "{{ m.content if loop.last or m.role == 'user' else m.content[:1] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def tokenizer(fixtures):
    return AutoTokenizer.from_pretrained(fixtures / "tokenizer_v5")


def without_marks(source: str) -> str:
    return source.replace("endgeneration", "endif").replace("generation %", "if true %")


def said(template: ChatTemplate, chat: Conversation) -> list[str]:
    rendered = template.render_spans(chat)
    return [rendered.text[span.start : span.end] for span in rendered.spans]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("marked", [True, False])
def test_masks_equal_the_recorded_ones(fixtures, layout, marked):
    tokenizer = AutoTokenizer.from_pretrained(fixtures / layout)
    if not marked:
        tokenizer.chat_template = without_marks(tokenizer.chat_template)
    template = ChatTemplate(tokenizer)
    assert template.is_marked == marked
    make = ExampleTokenizer(tokenizer, max_length=512, template=lambda: template)
    for sample in json.loads((fixtures / "chat_samples.json").read_text()):
        chat = conversation(sample["messages"], where="")
        assert template.render(chat) == sample["text"]
        if not any(sample["assistant_masks"]):
            with pytest.raises(DataError, match="no answer"):
                make.tokenize([chat])
            continue
        [document], _ = make.tokenize([chat])
        assert document.input_ids.tolist() == sample["input_ids"]
        assert document.trained.astype(int).tolist() == sample["assistant_masks"]


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("llama-3", ["yo<|eot_id|>", "a<|eot_id|>"]),
        ("mistral", [" yo<|eot_id|>", " a<|eot_id|>"]),
        ("alpaca", ["yo<|eot_id|>", "a<|eot_id|>"]),
    ],
)
def test_builtin_templates_mark_what_prefixes_find(tokenizer, name, answers, tmp_path):
    assert said(ChatTemplate(tokenizer, path=name), CHAT) == answers
    bare = tmp_path / "bare.jinja"
    bare.write_text(without_marks(BUILTIN_TEMPLATES[name].source))
    assert said(ChatTemplate(tokenizer, path=str(bare)), CHAT) == answers


def test_the_newline_after_a_turn_is_not_trained(tokenizer, tmp_path):
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    )
    get_chat_template(tokenizer, "chatml")
    assert tokenizer.eos_token == "<|im_end|>"
    tokenizer.chat_template = without_marks(tokenizer.chat_template)
    assert said(ChatTemplate(tokenizer), CHAT) == ["yo<|im_end|>", "a<|im_end|>"]


def test_builtin_templates_need_their_tokens(tokenizer):
    assert fitting_templates(tokenizer) == ["llama-3", "llama-3.1", "mistral", "alpaca"]
    with pytest.raises(ConfigError, match=re.escape("<|im_start|>")):
        get_chat_template(tokenizer, "chatml")
    with pytest.raises(ConfigError, match="must be one of llama-3"):
        get_chat_template(tokenizer, "llama-33")


@pytest.mark.parametrize("name", ["llama-3", "mistral", "alpaca"])
def test_builtin_templates_refuse_what_they_would_drop(tokenizer, name):
    template = ChatTemplate(tokenizer, path=name)
    tool = conversation([{"role": "tool", "content": "1"}], where="row 9")
    with pytest.raises(DataError, match="no tool calls") as caught:
        template.render(tool)
    assert caught.value.where == "row 9"


def test_rewritten_turns_train_the_last_one_and_say_so(tokenizer, tmp_path):
    path = tmp_path / "unstable.jinja"
    path.write_text(UNSTABLE)
    template = ChatTemplate(tokenizer, path=str(path))
    assert said(template, CHAT) == ["a"]
    assert template.render_spans(CHAT).note == LAST_TURN_NOTE
    make = ExampleTokenizer(tokenizer, max_length=512, template=lambda: template)
    _, report = make.tokenize([CHAT, CHAT])
    assert f"{LAST_TURN_NOTE} (2 rows)" in report.notes
    assert any("no end-of-turn token" in note for note in report.notes)


def test_messages_without_a_template_name_the_flag(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="--chat_template_path"):
        ExampleTokenizer(tokenizer, max_length=9).tokenize([CHAT])


def test_templates_come_from_files_and_both_kinds_of_folder(tokenizer, fixtures):
    own = ChatTemplate(tokenizer).source
    for path in (*LAYOUTS, "tokenizer_v5/chat_template.jinja"):
        assert ChatTemplate(tokenizer, path=str(fixtures / path)).source == own
    for path in ("bad_data", "no/such/file"):
        with pytest.raises(ModelError, match="no chat template can be read"):
            ChatTemplate(tokenizer, path=str(fixtures / path))


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("syntax", "TemplateSyntaxError"),
        ("undefined", "has no attribute 'nope'"),
        ("class_walk", "unsafe"),
        ("range_bomb", "Range too big"),
        ("nested_loops", "for over 2 s"),
    ],
)
def test_bad_templates_are_stopped(tokenizer, fixtures, name, what):
    path = fixtures / "bad_templates" / f"{name}.jinja"
    with pytest.raises(ModelError, match=what) as caught:
        ChatTemplate(tokenizer, path=str(path))
    assert str(path) in caught.value.where


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("{{ 'a' * 4000000000 }}", "MemoryError"),
        ("{{ 'a' * 5000000 }}", "5000000 characters"),
        ("a" * 70_000, "the limit is 65536"),
    ],
)
def test_templates_that_make_too_much_are_stopped(tokenizer, tmp_path, source, what):
    path = tmp_path / "big.jinja"
    path.write_text(source)
    with pytest.raises(ModelError, match=what):
        ChatTemplate(tokenizer, path=str(path))


def test_todays_date_is_the_same_every_day(tokenizer, tmp_path):
    path = tmp_path / "dated.jinja"
    path.write_text(
        "{%- set date = strftime_now('%d %b %Y') if strftime_now is defined %}\n"
        "{% for m in messages %}{{ date }}|{{ m.content }}{% endfor %}"
    )
    template = ChatTemplate(tokenizer, path=str(path))
    assert template.render(CHAT).startswith("26 Jul 2024|sys26 Jul 2024|hi")
    assert template.source == path.read_text()
    assert said(template, CHAT) == ["26 Jul 2024|yo", "26 Jul 2024|a"]


def test_a_template_without_marks_is_fine(tokenizer, fixtures):
    path = fixtures / "bad_templates" / "no_generation.jinja"
    assert said(ChatTemplate(tokenizer, path=str(path)), CHAT) == ["yo", "a"]
