"""tokenizer.json -> the tokenizer keys of a GGUF file."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from conversions.gguf.file import Value
from conversions.gguf.pre_tokenizer import PROBE, pre_tokenizer_name, split_probe
from conversions.strict_json import read_json_object
from fastjax.errors import ModelError, printable

MAX_TOKENIZER_BYTES = 100_000_000

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_BLANK = "\N{LOWER ONE EIGHTH BLOCK}"
# Whether llama.cpp drops blanks after them in models with "phi3" in their name.
_PHI3_BLANKS = {"</s>": True, "<unk>": False, "<s>": False, "<|endoftext|>": False}
_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}


@dataclasses.dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What the tokenizer files of a model folder say.

    Attributes:
      path: tokenizer.json.
      values: Its content.
      settings: Content of tokenizer_config.json; empty when there is none.
      chat_template: Jinja; None when the folder has none.
    """

    path: Path
    values: Mapping[str, Any]
    settings: Mapping[str, Any]
    chat_template: str | None


def read_tokenizer(folder: Path) -> TokenizerFiles:
    """Returns the tokenizer of a folder.

    Raises:
      ModelError: tokenizer.json is missing or broken.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(
            "a GGUF file holds the tokenizer, and the folder has no tokenizer.json",
            where=str(folder),
            fix="copy tokenizer.json and tokenizer_config.json of the model there",
        )
    values = read_json_object(path, limit_bytes=MAX_TOKENIZER_BYTES)
    config = folder / "tokenizer_config.json"
    settings: dict[str, Any] = {}
    if config.exists():
        settings = read_json_object(config, limit_bytes=MAX_TOKENIZER_BYTES)
    model = values.get("model")
    model = model if isinstance(model, dict) else {}
    is_bpe = model.get("type", "BPE") == "BPE" and isinstance(model.get("merges"), list)
    if not is_bpe or not isinstance(model.get("vocab"), dict):
        raise ModelError("only BPE tokenizers go into a GGUF file", where=str(path))
    return TokenizerFiles(path, values, settings, _chat_template(folder, settings))


def tokenizer_metadata(files: TokenizerFiles, vocab_size: int) -> dict[str, Value]:
    """Returns the tokenizer keys of a model with `vocab_size` rows of embeddings.

    Raises:
      ModelError: llama.cpp has no tokenizer that does the same.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(files.path))
    model = files.values["model"]
    tokens, kinds = _tokens(files, vocab_size)
    keys: dict[str, Value] = {}
    if model.get("byte_fallback"):
        keys["model"], keys["pre"] = "llama", "default"
        keys["add_space_prefix"] = _adds_blank(tokenizer, str(files.path))
        keys["scores"] = _scores(tokens, _merges(model))
    else:
        keys["model"] = "gpt2"
        keys["pre"] = pre_tokenizer_name(
            tokenizer,
            ignores_merges=bool(model.get("ignore_merges")),
            where=str(files.path),
        )
        keys["merges"] = [f"{left} {right}" for left, right in _merges(model)]
    keys["tokens"], keys["token_type"] = tokens, np.asarray(kinds, np.int32)
    ids = _special_ids(files, tokens)
    for name, token in ids.items():
        keys[f"{_SPECIAL[name]}_token_id"] = np.uint32(token)
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    framed = tokenizer.encode("a", add_special_tokens=True).ids
    added = len(framed) - len(plain)
    keys["add_bos_token"] = bool(added) and framed[0] == ids.get("bos")
    keys["add_eos_token"] = bool(added) and framed[-1] == ids.get("eos")
    named = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    if files.chat_template is not None:
        named["tokenizer.chat_template"] = files.chat_template
    return named


def require_same_blanks(files: TokenizerFiles, name: str) -> None:
    """Checks the tokens that llama.cpp treats by the name of the model.

    With "phi3" or "phi-3" in it, blanks after control tokens are dropped, after some
    named ones kept (src/llama-vocab.cpp), whatever the file says; and it stops when one
    of these is missing.

    Raises:
      ModelError: The tokenizer does otherwise.
    """
    if not any(part in name.lower() for part in ("phi3", "phi-3")):
        return
    added = {token["content"]: token for token in _added(files)}
    known = files.values["model"]["vocab"]
    missing = [text for text in _PHI3_BLANKS if text not in {*added, *known}]
    differing = [
        text
        for text, token in added.items()
        if token.get("special")
        and bool(token.get("rstrip")) != _PHI3_BLANKS.get(text, True)
    ]
    if missing or differing:
        reason = f"lacks {', '.join(missing)}"
        if not missing:
            reason = f"treats blanks after {', '.join(differing[:5])} otherwise"
        raise ModelError(
            f"llama.cpp takes {printable(name)!r} for a Phi-3 by its name, but the "
            f"tokenizer {reason}",
            where=str(files.path),
            fix="give the folder of the base model a name without phi3",
        )


def stop_texts(files: TokenizerFiles, token_ids: tuple[int, ...]) -> list[str]:
    """Returns the texts of the tokens that end a turn, the tokenizer's own first."""
    texts = {token: text for text, token in files.values["model"]["vocab"].items()}
    texts |= {token["id"]: token["content"] for token in _added(files)}
    own = _content(files.settings.get("eos_token"))
    found = [own, *(texts.get(token) for token in token_ids)]
    return list(dict.fromkeys(text for text in found if text))


def _tokens(files: TokenizerFiles, vocab_size: int) -> tuple[list[str], list[int]]:
    """Returns text and kind of each row; rows without a token get a stand-in."""
    texts = {number: text for text, number in files.values["model"]["vocab"].items()}
    added = {token["id"]: token for token in _added(files)}
    highest = max([*texts, *added])
    if highest >= vocab_size:
        raise ModelError(
            f"the tokenizer has a token {highest}, the model only {vocab_size} rows of "
            "embeddings",
            where=str(files.path),
            fix="take the tokenizer that the model was trained with",
        )
    unknown = files.values["model"].get("unk_token")
    has_bytes = bool(files.values["model"].get("byte_fallback"))
    tokens, kinds = [], []
    for number in range(vocab_size):
        text, kind = texts.get(number), _NORMAL
        if number in added:
            text = added[number]["content"]
            kind = _CONTROL if added[number].get("special") else _USER_DEFINED
        if text is None:
            text, kind = f"[PAD{number}]", _UNUSED
        elif text == unknown:
            kind = _UNKNOWN
        elif has_bytes and len(text) == 6 and text.startswith("<0x"):
            kind = _BYTE
        tokens.append(text)
        kinds.append(kind)
    return tokens, kinds


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the merges, which older files write as one text with a space."""
    pairs = (m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"])
    return [(left, right) for left, right in pairs]


def _scores(tokens: list[str], merges: list[tuple[str, str]]) -> np.ndarray:
    """Returns the order of merging as SentencePiece's scores: earlier is higher."""
    rank: dict[str, int] = {}
    for place, (left, right) in enumerate(merges):
        rank.setdefault(left + right, place)
    return np.asarray([-float(rank.get(t, len(merges))) for t in tokens], np.float32)


def _adds_blank(tokenizer: Any, where: str) -> bool:
    """Says whether a text gets a blank in front, as SentencePiece may be told."""
    expected = PROBE.replace(" ", _BLANK)
    pieces = split_probe(tokenizer)
    if pieces not in ([expected], [_BLANK + expected]):
        raise ModelError(
            "this tokenizer splits or changes texts in a way that llama.cpp's "
            "SentencePiece tokenizer does not",
            where=where,
            fix="convert the merged folder with llama.cpp's own converter",
        )
    return pieces[0] != expected


def _special_ids(files: TokenizerFiles, tokens: list[str]) -> dict[str, int]:
    """Returns the ids of the special tokens that the tokenizer names."""
    place = {text: number for number, text in enumerate(tokens)}
    named = {name: _content(files.settings.get(f"{name}_token")) for name in _SPECIAL}
    return {name: place[text] for name, text in named.items() if text in place}


def _added(files: TokenizerFiles) -> list[dict[str, Any]]:
    added = files.values.get("added_tokens") or []
    for token in added:
        is_whole = isinstance(token, dict) and isinstance(token.get("content"), str)
        if not is_whole or type(token.get("id")) is not int or token["id"] < 0:
            raise ModelError(
                f"added token {printable(token)} needs an id and a content",
                where=str(files.path),
            )
    return added


def _content(token: Any) -> str | None:
    """Returns the text of a special token, which files write in two ways."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    inline = settings.get("chat_template")
    if isinstance(inline, list):
        named = {t.get("name"): t.get("template") for t in inline}
        inline = named.get("default")
    return inline if isinstance(inline, str) else None
