"""Answers to a file of prompts, while a model trains."""

from collections.abc import Callable
from pathlib import Path

from flax import nnx
from jaxtyping import PyTree

from fastjax.api.generation import prompt_ids, require_tokenizer
from fastjax.api.language_model import LanguageModel
from fastjax.config import ReportConfig
from fastjax.errors import ConfigError, printable
from fastjax.inference.generate import generate

_MOST_PROMPTS = 32
_MOST_BYTES = 1 << 20


def read_prompts(path: Path) -> list[str]:
    """Returns the prompts of a text file, a line each.

    Raises:
      ConfigError: There is no such file, it is no text, or holds none or too many.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_MOST_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"sample_prompts cannot be read: {printable(error)}", where=str(path)
        ) from error
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not 1 <= len(prompts) <= _MOST_PROMPTS:
        raise ConfigError(
            f"sample_prompts holds {len(prompts)} prompts",
            where=str(path),
            fix=f"write 1 to {_MOST_PROMPTS}, a line each",
        )
    return prompts


def make_sampler(
    model: LanguageModel, config: ReportConfig
) -> Callable[[PyTree], list[tuple[str, str]]] | None:
    """Returns what answers the sample prompts with newer weights; None without any.

    The likeliest tokens are taken, so that only the weights change the answers.
    """
    if config.sample_prompts is None:
        return None
    prompts = read_prompts(Path(config.sample_prompts))
    tokenizer = require_tokenizer(model)
    is_chat = bool(tokenizer.chat_template)
    ids = [prompt_ids(tokenizer, prompt, is_chat=is_chat) for prompt in prompts]
    graphdef, _, frozen = model.split()

    def sample(trainable: PyTree) -> list[tuple[str, str]]:
        rows = generate(
            nnx.merge(graphdef, trainable, frozen),
            ids,
            max_new_tokens=config.sample_max_new_tokens,
            stop_ids=model.stop_ids(),
        )
        texts = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
        return list(zip(prompts, texts, strict=True))

    return sample
