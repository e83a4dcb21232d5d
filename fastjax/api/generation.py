"""Text in, text out."""

from collections.abc import Callable, Sequence
from typing import Any

from fastjax.api.device_faults import device_faults
from fastjax.api.language_model import LanguageModel
from fastjax.api.loading import load_model
from fastjax.config import DType, QuantConfig
from fastjax.errors import ModelError
from fastjax.inference.generate import generate
from fastjax.inference.sampling import Sampling


def run_generation(
    name: str,
    prompts: Sequence[str],
    *,
    sampling: Sampling,
    max_new_tokens: int,
    seed: int = 0,
    uses_chat_template: bool = True,
    quant: QuantConfig | None = None,
    dtype: DType = "bfloat16",
    stream: Callable[[str], Any] | None = None,
) -> list[str]:
    """Returns the answers of the model of that name; see `load_model`, `answer`."""
    model = load_model(name, dtype=dtype, quant=quant)
    return answer(
        model,
        prompts,
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        seed=seed,
        uses_chat_template=uses_chat_template,
        stream=stream,
    )


def answer(
    model: LanguageModel,
    prompts: Sequence[str],
    *,
    sampling: Sampling | None = None,
    max_new_tokens: int = 128,
    seed: int = 0,
    uses_chat_template: bool = True,
    stream: Callable[[str], Any] | None = None,
) -> list[str]:
    """Returns one answer a prompt, all prompts in one batch.

    Args:
      model: Needs a tokenizer.
      prompts: Questions, or beginnings of texts.
      sampling: How tokens are drawn; None takes the likeliest.
      max_new_tokens: Most tokens of an answer.
      seed: Of the drawing.
      uses_chat_template: Each prompt is a user's turn, when there is a template.
      stream: Takes the text of a single prompt's answer as it comes.

    Raises:
      ModelError: The model has no tokenizer.
    """
    tokenizer = require_tokenizer(model)
    is_chat = uses_chat_template and bool(tokenizer.chat_template)
    ids = [prompt_ids(tokenizer, prompt, is_chat=is_chat) for prompt in prompts]
    return answer_ids(
        model,
        ids,
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        seed=seed,
        stream=stream,
    )


def answer_ids(
    model: LanguageModel,
    prompts: Sequence[list[int]],
    *,
    sampling: Sampling | None = None,
    max_new_tokens: int = 128,
    seed: int = 0,
    stream: Callable[[str], Any] | None = None,
) -> list[str]:
    """Returns the text that continues each prompt of tokens; see `answer`."""
    tokenizer = require_tokenizer(model)
    printer = None if stream is None else _Printer(tokenizer, stream)
    with device_faults("generate", memory_fix="fewer or shorter prompts at once"):
        answers = generate(
            model.for_inference(),
            prompts,
            max_new_tokens=max_new_tokens,
            stop_ids=model.stop_ids(),
            sampling=sampling,
            seed=seed,
            on_tokens=None if printer is None else printer.add,
        )
    return [tokenizer.decode(row, skip_special_tokens=True) for row in answers]


def require_tokenizer(model: LanguageModel) -> Any:
    """Returns the model's tokenizer.

    Raises:
      ModelError: It has none.
    """
    if model.tokenizer is None:
        raise ModelError(
            "the model folder has no tokenizer", where=str(model.source.folder)
        )
    return model.tokenizer


def chat_ids(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[int]:
    """Returns the tokens of turns, up to where the model's next turn begins."""
    encoded = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=True, return_dict=True
    )
    return encoded["input_ids"]


class _Printer:
    """Turns tokens into text piece by piece; never half a character."""

    def __init__(self, tokenizer: Any, write: Callable[[str], Any]) -> None:
        self._tokenizer, self._write = tokenizer, write
        self._ids: list[int] = []
        self._shown = ""

    def add(self, new: list[list[int]]) -> None:
        self._ids += new[0]
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._write(text[len(self._shown) :])
            self._shown = text


def prompt_ids(tokenizer: Any, prompt: str, *, is_chat: bool) -> list[int]:
    """Returns the tokens of a prompt, as a user's turn when it is a chat."""
    if not is_chat:
        return tokenizer(prompt)["input_ids"]
    return chat_ids(tokenizer, [{"role": "user", "content": prompt}])
