"""Tokenizers: known ones by what they do, unknown ones stop the export."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)

from conversions.gguf import matching_format, modelfile, read_tokenizer, stop_texts
from conversions.gguf.ollama import CHAT_FORMATS
from conversions.gguf.pre_tokenizer import PRE_TOKENIZERS
from conversions.gguf.tokenizer import require_same_blanks, tokenizer_metadata
from fastjax.data.builtin_templates import BUILTIN_TEMPLATES
from fastjax.errors import ModelError

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
BLANK = "▁"


def saved(folder: Path, tokenizer: Tokenizer, **settings: object) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def byte_level(pre_tokenizer: pre_tokenizers.PreTokenizer, **options) -> Tokenizer:
    vocab = {text: number for number, text in enumerate([*BYTES, "ab"])}
    model = models.BPE(vocab=vocab, merges=[("a", "b")], **options)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    return tokenizer


def split_as(*expressions: str) -> pre_tokenizers.PreTokenizer:
    steps = [pre_tokenizers.Split(Regex(e), "isolated") for e in expressions]
    return pre_tokenizers.Sequence([*steps, BYTE_LEVEL])


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_each_pre_tokenizer_is_known(name: str, tmp_path: Path) -> None:
    known = PRE_TOKENIZERS[name]
    tokenizer = byte_level(
        split_as(*known.expressions), ignore_merges=known.ignores_merges
    )
    tokenizer.normalizer = normalizers.NFC()
    files = read_tokenizer(saved(tmp_path, tokenizer))
    assert tokenizer_metadata(files, 300)["tokenizer.ggml.pre"] == name


def test_what_hugging_face_calls_digits_is_known(tmp_path: Path) -> None:
    tokenizer = byte_level(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    )
    files = read_tokenizer(saved(tmp_path, tokenizer))
    assert tokenizer_metadata(files, 300)["tokenizer.ggml.pre"] == "smollm"


@pytest.mark.parametrize(
    "expression", [r"\w+|\s", r" ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s+"]
)
def test_an_unknown_one_stops_the_export(expression: str, tmp_path: Path) -> None:
    files = read_tokenizer(saved(tmp_path, byte_level(split_as(expression))))
    with pytest.raises(ModelError, match="no pre-tokenizer"):
        tokenizer_metadata(files, 300)


def test_rows_without_a_token_are_filled_and_tokens_need_a_row(tmp_path: Path) -> None:
    tokenizer = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.add_special_tokens(["<end>"])
    folder = saved(tmp_path, tokenizer, eos_token={"content": "<end>"})
    files = read_tokenizer(folder)
    keys = tokenizer_metadata(files, 260)
    assert keys["tokenizer.ggml.tokens"][256:] == [
        "ab",
        "<end>",
        "[PAD258]",
        "[PAD259]",
    ]
    assert keys["tokenizer.ggml.token_type"][256:].tolist() == [1, 3, 5, 5]
    assert keys["tokenizer.ggml.eos_token_id"] == 257
    assert keys["tokenizer.ggml.merges"] == ["a b"]
    assert stop_texts(files, (256,)) == ["<end>", "ab"]
    with pytest.raises(ModelError, match="token 257"):
        tokenizer_metadata(files, 257)


@pytest.mark.parametrize("adds_blank", [True, False])
def test_sentencepiece_gets_scores_in_the_order_of_its_merges(
    adds_blank: bool, tmp_path: Path
) -> None:
    texts = ["<unk>", "<0x41>", BLANK, "a", "b", "ab", BLANK + "ab"]
    vocab = {text: number for number, text in enumerate(texts)}
    merges = [("a", "b"), (BLANK, "ab")]
    model = models.BPE(
        vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>"
    )
    tokenizer = Tokenizer(model)
    steps = [normalizers.Prepend(BLANK)] if adds_blank else []
    tokenizer.normalizer = normalizers.Sequence(
        [*steps, normalizers.Replace(" ", BLANK)]
    )
    tokenizer.decoder = decoders.ByteFallback()
    keys = tokenizer_metadata(read_tokenizer(saved(tmp_path, tokenizer)), 8)
    assert keys["tokenizer.ggml.model"] == "llama"
    assert keys["tokenizer.ggml.add_space_prefix"] is adds_blank
    assert keys["tokenizer.ggml.token_type"].tolist() == [2, 6, 1, 1, 1, 1, 1, 5]
    scores = keys["tokenizer.ggml.scores"]
    assert scores.dtype == np.float32
    assert scores[5] > scores[6] > scores[3]


def test_a_sentencepiece_that_changes_texts_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0}, merges=[], byte_fallback=True))
    tokenizer.normalizer = normalizers.Lowercase()
    files = read_tokenizer(saved(tmp_path, tokenizer))
    with pytest.raises(ModelError, match="SentencePiece"):
        tokenizer_metadata(files, 4)


def test_models_with_phi3_in_their_name_need_its_tokens(tmp_path: Path) -> None:
    tokenizer = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    files = read_tokenizer(saved(tmp_path, tokenizer))
    require_same_blanks(files, "some-llama")
    with pytest.raises(ModelError, match="lacks </s>, <unk>, <s>"):
        require_same_blanks(files, "Phi-3-mini")
    named = {"</s>": True, "<unk>": False, "<s>": False, "<|endoftext|>": False}
    for text, strips in (named | {"<|end|>": True}).items():
        tokenizer.add_special_tokens([AddedToken(text, rstrip=strips, special=True)])
    files = read_tokenizer(saved(tmp_path, tokenizer))
    require_same_blanks(files, "Phi-3-mini")
    tokenizer.add_special_tokens([AddedToken("<|user|>", special=True)])
    files = read_tokenizer(saved(tmp_path, tokenizer))
    with pytest.raises(ModelError, match=r"blanks after <\|user\|> otherwise"):
        require_same_blanks(files, "phi3-tuned")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama-3", "llama-3"),
        ("llama-3.1", "llama-3"),
        ("chatml", "chatml"),
        ("qwen-2.5", "chatml"),
        ("mistral", "mistral"),
        ("alpaca", None),
    ],
)
def test_chat_templates_are_known_by_what_they_write(
    name: str, expected: str | None
) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    def render(chat) -> str:
        texts, _ = render_jinja_template(
            [list(chat.messages)],
            chat_template=BUILTIN_TEMPLATES[name].source,
            add_generation_prompt=True,
            bos_token="<s>",
            eos_token="</s>",
        )
        return texts[0]

    assert matching_format(render) == expected


def test_a_modelfile_names_files_template_and_stops() -> None:
    text = modelfile("./m.gguf", format_name="chatml", stops=["<|im_end|>"])
    assert text.splitlines()[0] == "FROM ./m.gguf"
    assert 'PARAMETER stop "<|im_end|>"' in text
    for name, known in CHAT_FORMATS.items():
        for part in ("{{ .System }}", "{{ .Prompt }}", "{{ .Response }}"):
            assert known.go_template().count(part) == 1, name
    text = modelfile("base", format_name=None, stops=(), adapter="./a.gguf")
    assert text == "FROM base\nADAPTER ./a.gguf\n"
