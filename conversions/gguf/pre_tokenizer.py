"""Which of llama.cpp's pre-tokenizers splits texts as a tokenizer does.

A wrong one would not fail: the model would answer worse. So a tokenizer must split a
probe exactly as one of the expressions below does, or the export stops.
"""

import dataclasses
from typing import Any

from fastjax.errors import ModelError

# Contractions, case, runs of digits and blanks, line ends, punctuation, slashes, marks,
# scripts, symbols: where the expressions differ. All of it is in normal form C.
PROBE = (
    "It's WE'LL they'Ve camelCase HTMLParser x1y22z333 1234567 1,000.50 ３４५६७\n"
    "\n\n \n\t\ttabs  two   three    four \r\n end.\n\n(a+b)/c//d/\n/e ==> [[x]]!?\n"
    "café Ångström नमस्ते ไทย 日本語テキスト 한국어 русский ЯЗЫК ǅ ʰ ⅷ ½ №7 "
    "👍🏽 ♥️ ∑∫ “quoted”…  \u00a0no-break\u3000wide 'tis ''s 'S\n   "
)

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = f"{_CONTRACTIONS}|{_WORDS}|\\p{{N}}{{1,3}}|{_MARKS}|{_TAIL}"
_QWEN2 = f"{_CONTRACTIONS}|{_WORDS}|\\p{{N}}|{_MARKS}|{_TAIL}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
)


@dataclasses.dataclass(frozen=True, slots=True)
class PreTokenizer:
    """One of llama.cpp's pre-tokenizers (src/llama-vocab.cpp).

    Attributes:
      expressions: They split one after the other.
      ignores_merges: A piece that is a token stays whole, whatever the merges say.
    """

    expressions: tuple[str, ...]
    ignores_merges: bool = False


PRE_TOKENIZERS = {
    "llama-bpe": PreTokenizer((_CL100K,), ignores_merges=True),
    "dbrx": PreTokenizer((_CL100K,)),
    "qwen2": PreTokenizer((_QWEN2,)),
    "tekken": PreTokenizer((_TEKKEN,), ignores_merges=True),
    "gpt-2": PreTokenizer((_GPT2,)),
    "smollm": PreTokenizer((r"\p{N}", _GPT2)),
}


def pre_tokenizer_name(tokenizer: Any, *, ignores_merges: bool, where: str) -> str:
    """Returns llama.cpp's name for how a byte-level tokenizer splits texts.

    Args:
      tokenizer: A `tokenizers.Tokenizer`.
      ignores_merges: What its model says of pieces that are tokens.
      where: The file, for errors.

    Raises:
      ModelError: It splits the probe as none of them does.
    """
    pieces = split_probe(tokenizer)
    for name, known in PRE_TOKENIZERS.items():
        if known.ignores_merges == ignores_merges and pieces == _known_pieces(known):
            return name
    raise ModelError(
        "no pre-tokenizer of llama.cpp that is known here splits texts as this "
        "tokenizer does; with another one the model would answer worse without a sign",
        where=where,
        fix=f"known are: {', '.join(PRE_TOKENIZERS)}; convert the merged folder with "
        "llama.cpp's own converter",
    )


def split_probe(tokenizer: Any) -> list[str]:
    """Returns the pieces of the probe before merging, normalised."""
    text = PROBE
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    if tokenizer.pre_tokenizer is None:
        return [text]
    return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def _known_pieces(known: PreTokenizer) -> list[str]:
    from tokenizers import Regex, pre_tokenizers

    steps = [
        pre_tokenizers.Split(Regex(expression), "isolated")
        for expression in known.expressions
    ]
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Sequence([*steps, bytewise])
    return [piece for piece, _ in split.pre_tokenize_str(PROBE)]
