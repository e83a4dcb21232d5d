"""A talk with a model: every turn is answered with all turns before it in view."""

import contextlib
from collections.abc import Callable
from typing import Any

from fastjax.api.generation import answer_ids, chat_ids, require_tokenizer
from fastjax.api.language_model import LanguageModel
from fastjax.inference.sampling import Sampling


class Conversation:
    """Turns of a user and a model.

    A model without a chat template sees each turn alone, as the beginning of a text.

    Attributes:
      messages: The turns so far, as chat templates take them.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        system: str = "",
        sampling: Sampling | None = None,
        max_new_tokens: int = 512,
        seed: int = 0,
    ) -> None:
        """Begins a talk.

        Args:
          model: Needs a tokenizer.
          system: First message, which stays; none when empty.
          sampling: How tokens are drawn; None takes the likeliest.
          max_new_tokens: Most tokens of an answer.
          seed: Of the drawing; turn i draws with `seed + i`.
        """
        self._model, self._tokenizer = model, require_tokenizer(model)
        self._sampling, self._max_new_tokens = sampling, max_new_tokens
        self._seed = seed
        self._first = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, str]] = list(self._first)

    @property
    def has_template(self) -> bool:
        """Whether turns are rendered as a chat."""
        return bool(self._tokenizer.chat_template)

    def reset(self) -> None:
        """Forgets all turns but the system's."""
        self.messages = list(self._first)

    def say(self, text: str, stream: Callable[[str], Any] | None = None) -> str:
        """Returns the answer to a user's turn; one that is not answered is forgotten.

        Args:
          text: The turn.
          stream: Takes the answer piece by piece as it comes.
        """
        self.messages.append({"role": "user", "content": text})
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self.messages.pop)
            ids = self._ids()
            (reply,) = answer_ids(
                self._model,
                [ids],
                sampling=self._sampling,
                max_new_tokens=self._max_new_tokens,
                seed=self._seed + len(self.messages) // 2,
                stream=stream,
            )
            on_failure.pop_all()
        self.messages.append({"role": "assistant", "content": reply})
        return reply

    def _ids(self) -> list[int]:
        """Returns the talk's tokens; oldest turns go when the context is full."""
        if not self.has_template:
            return self._tokenizer(self.messages[-1]["content"])["input_ids"]
        room = self._model.config.context_tokens - self._max_new_tokens
        ids = chat_ids(self._tokenizer, self.messages)
        while len(ids) > room and len(self.messages) > len(self._first) + 2:
            oldest = len(self._first)
            del self.messages[oldest : oldest + 2]
            ids = chat_ids(self._tokenizer, self.messages)
        return ids
