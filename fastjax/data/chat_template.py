"""Renders conversations with a Jinja chat template and finds the assistant's words."""

import dataclasses
import datetime
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastjax.data.builtin_templates import BUILTIN_TEMPLATES
from fastjax.data.examples import Conversation, Message
from fastjax.data.template_check import (
    MAX_RENDERED_CHARACTERS,
    MAX_SOURCE_BYTES,
    check_template,
)
from fastjax.errors import ConfigError, DataError, ModelError, printable
from fastjax.files import user_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LAST_TURN_NOTE = (
    "the chat template rewrites earlier turns, so only the last assistant turn of "
    "these rows is trained, and what follows it is cut"
)
_GENERATION_TAG = re.compile(r"\{%-?\+?\s*generation\s*[-+]?%\}")
# Templates that print today's date would change the data from one day to the next;
# this is the date that Llama 3 templates print where there is no clock.
_FIXED_TIME = datetime.datetime(2024, 7, 26)
_FIXED_DATE = _FIXED_TIME.strftime("%d %b %Y")
_CLOCK = "strftime_now"
_DIRECTIVES = (
    "%A",
    "%a",
    "%B",
    "%b",
    "%d",
    "%-d",
    "%H",
    "%j",
    "%M",
    "%m",
    "%S",
    "%Y",
    "%y",
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TurnSpan:
    """Characters that one assistant turn says, with its end-of-turn token.

    Attributes:
      turn: Index of the message; None where a template's marks do not tell.
    """

    start: int
    end: int
    turn: int | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RenderedChat:
    """The text of a conversation and what the assistant says in it."""

    text: str
    spans: tuple[TurnSpan, ...]
    note: str = ""


class ChatTemplate:
    """A tokenizer's chat template, checked once in a worker process.

    Args:
      tokenizer: Gives the template and the special tokens.
      path: Jinja file, tokenizer folder or name of a built-in template that is used
        instead of the tokenizer's own.

    Raises:
      DataError: The tokenizer has no template and no path is given.
      ModelError: The template cannot be read, fails or breaks a limit.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", *, path: str | None = None
    ) -> None:
        source = template_source(path) if path else _own_source(tokenizer)
        self.source: str = source
        self._rendered_source = _without_clock(source)
        self.is_marked = bool(_GENERATION_TAG.search(source))
        names = tokenizer.special_tokens_map.items()
        self._special_tokens = {k: v for k, v in names if isinstance(v, str)}
        self._control_tokens = tuple(control_tokens(tokenizer).values())
        where = path or printable(tokenizer.name_or_path)
        check_template(self._rendered_source, self._special_tokens, where=where)

    def render(
        self, conversation: Conversation, *, add_generation_prompt: bool = False
    ) -> str:
        """Returns the text of a conversation.

        Args:
          conversation: Its messages and tools are shown to the template.
          add_generation_prompt: Ends with the header of an assistant turn.

        Raises:
          DataError: The template refuses the conversation.
        """
        messages = conversation.messages
        return self._text(conversation, messages, waits=add_generation_prompt)[0]

    def render_spans(self, conversation: Conversation) -> RenderedChat:
        """Returns the text and the spans of the assistant's turns.

        With `{% generation %}` marks the spans are those marks. Else turn i is what
        lies between `messages[:i]` with a generation prompt and `messages[:i + 1]`,
        both of which must be true prefixes of the whole text.
        """
        text, marks = self._text(conversation, conversation.messages, marked=True)
        turns = _assistant_turns(conversation)
        if self.is_marked:
            known = turns if len(marks) == len(turns) else [None] * len(marks)
            pairs = zip(marks, known, strict=True)
            spans = [TurnSpan(start=a, end=b, turn=turn) for (a, b), turn in pairs]
            return RenderedChat(text=text, spans=tuple(spans))
        spans = [self._turn_span(conversation, text, turn) for turn in turns]
        found = [span for span in spans if span is not None]
        if len(found) == len(spans):
            return RenderedChat(text=text, spans=tuple(found))
        return self._last_turn(conversation, turns[-1])

    def _last_turn(self, conversation: Conversation, turn: int) -> RenderedChat:
        messages = conversation.messages[: turn + 1]
        text, _ = self._text(conversation, messages)
        shorter = dataclasses.replace(conversation, messages=messages)
        span = self._turn_span(shorter, text, turn)
        spans = (span,) if span is not None else ()
        return RenderedChat(text=text, spans=spans, note=LAST_TURN_NOTE)

    def _turn_span(
        self, conversation: Conversation, text: str, turn: int
    ) -> TurnSpan | None:
        messages = conversation.messages
        try:
            before, _ = self._text(conversation, messages[:turn], waits=True)
            is_last = turn + 1 == len(messages)
            after = (
                text if is_last else self._text(conversation, messages[: turn + 1])[0]
            )
        except DataError:  # Some templates refuse a part of what they take whole.
            return None
        if not (after.startswith(before) and text.startswith(after)):
            return None
        said = after[len(before) :].rstrip()
        ends_turn = said.endswith(self._control_tokens)
        end = len(before) + len(said) if ends_turn else len(after)
        return TurnSpan(start=len(before), end=end, turn=turn)

    def _text(
        self,
        conversation: Conversation,
        messages: tuple[Message, ...],
        *,
        waits: bool = False,
        marked: bool = False,
    ) -> tuple[str, list[tuple[int, int]]]:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        variables: dict[str, Any] = {**self._special_tokens, "date_string": _FIXED_DATE}
        try:
            texts, marks = render_jinja_template(
                [list(messages)],
                tools=list(conversation.tools) or None,
                chat_template=self._rendered_source,
                return_assistant_tokens_mask=marked and self.is_marked,
                add_generation_prompt=waits,
                **variables,
            )
        except (TemplateError, TypeError, ValueError, KeyError, OverflowError) as error:
            raise DataError(
                f"the chat template refuses this row: {printable(error)}",
                where=conversation.where,
                fix="change the row, or take another template: --chat_template_path",
                code="FJ-DATA-TEMPLATE",
            ) from error
        if len(texts[0]) > MAX_RENDERED_CHARACTERS:
            what = "the chat template makes over 4 MB of text of this row"
            raise DataError(what, where=conversation.where)
        spans = marks[0] if marks else []
        return texts[0], [(int(start), int(end)) for start, end in spans]


def _without_clock(source: str) -> str:
    """Returns a template whose `strftime_now` always prints the same day.

    A macro of that name hides the function.
    """
    if _CLOCK not in source:
        return source
    prints = "".join(
        f"|replace('{directive}', '{_FIXED_TIME.strftime(directive)}')"
        for directive in _DIRECTIVES
    )
    macro = f"{{%- macro {_CLOCK}(format) -%}}{{{{ format{prints} }}}}"
    # The newline after a block is dropped: the template still begins a line.
    return f"{macro}{{%- endmacro %}}\n{source}"


def template_source(path: str) -> str:
    """Returns a built-in template by name, or the one in a file or tokenizer folder.

    Raises:
      ModelError: There is none, or it is too long.
    """
    if path in BUILTIN_TEMPLATES:
        return BUILTIN_TEMPLATES[path].source
    file = user_path(path)
    if os.path.isdir(file):
        if not (file / "chat_template.jinja").is_file():
            return _inline_source(file)
        file /= "chat_template.jinja"
    try:
        with file.open("rb") as stream:
            return stream.read(MAX_SOURCE_BYTES + 1).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _no_template(path, printable(error)) from error


def get_chat_template(
    tokenizer: "PreTrainedTokenizerBase", chat_template: str = "chatml"
) -> "PreTrainedTokenizerBase":
    """Gives the tokenizer a built-in chat template and the end-of-turn token as EOS.

    Args:
      tokenizer: Changed and returned.
      chat_template: A name of `BUILTIN_TEMPLATES`.

    Raises:
      ConfigError: No such template, or the vocabulary lacks its control tokens.
    """
    template = BUILTIN_TEMPLATES.get(chat_template)
    if template is None:
        names = ", ".join(BUILTIN_TEMPLATES)
        raise ConfigError(f"{chat_template=} must be one of {names}")
    lacking = _lacking(tokenizer, template.control_tokens)
    if lacking:
        raise ConfigError(
            f"the tokenizer has no token {', '.join(lacking)}, which the chat "
            f"template {chat_template!r} needs",
            fix=f"these fit it: {', '.join(fitting_templates(tokenizer))}",
        )
    tokenizer.chat_template = template.source
    if template.end_of_turn is not None:
        tokenizer.eos_token = template.end_of_turn
    return tokenizer


def fitting_templates(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Returns the built-in templates whose control tokens the tokenizer has."""
    return [
        name
        for name, template in BUILTIN_TEMPLATES.items()
        if not _lacking(tokenizer, template.control_tokens)
    ]


def control_tokens(tokenizer: "PreTrainedTokenizerBase") -> dict[int, str]:
    """Returns the added tokens by id, such as the borders of turns."""
    concrete: Any = tokenizer  # Subclasses define what follows.
    return {i: str(token) for i, token in concrete.added_tokens_decoder.items()}


def _lacking(
    tokenizer: "PreTrainedTokenizerBase", tokens: tuple[str, ...]
) -> list[str]:
    vocabulary = tokenizer.get_vocab()
    return [token for token in tokens if token not in vocabulary]


def _assistant_turns(conversation: Conversation) -> list[int]:
    roles = enumerate(message["role"] for message in conversation.messages)
    return [i for i, role in roles if role == "assistant"]


def _own_source(tokenizer: "PreTrainedTokenizerBase") -> str:
    if not tokenizer.chat_template:
        raise DataError(
            "the data holds messages and the tokenizer has no chat template",
            where=printable(tokenizer.name_or_path),
            fix="give one with --chat_template_path: a Jinja file, the folder of "
            f"an instruct model, or one of {', '.join(fitting_templates(tokenizer))}",
            code="FJ-DATA-TEMPLATE",
        )
    return tokenizer.get_chat_template()


def _inline_source(folder: Path) -> str:
    """Returns the template inside tokenizer_config.json, as transformers 4 wrote it."""
    file = folder / "tokenizer_config.json"
    try:
        source = json.loads(file.read_text(encoding="utf-8")).get("chat_template")
    except (OSError, ValueError, AttributeError) as error:
        raise _no_template(str(folder), printable(error)) from error
    if not isinstance(source, str):
        raise _no_template(str(folder), "tokenizer_config.json holds no chat_template")
    return source


def _no_template(path: str, reason: str) -> ModelError:
    names = ", ".join(BUILTIN_TEMPLATES)
    return ModelError(
        f"no chat template can be read: {reason}",
        where=path,
        fix=f"give a Jinja file, a tokenizer folder, or one of {names}",
        code="FJ-MODEL-TEMPLATE",
    )
