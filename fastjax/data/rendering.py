"""Renders one example to text and marks the characters that carry loss."""

import dataclasses
import itertools

from fastjax.config import TrainOn
from fastjax.data.chat_template import ChatTemplate, RenderedChat
from fastjax.data.examples import (
    Completion,
    Conversation,
    Segments,
    Text,
)
from fastjax.errors import ConfigError, DataError

Span = tuple[int, int]
Rendered = Text | Completion | Conversation | Segments
"""What has a text, which `Tokens` have not."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ResponseMarkers:
    """Strings around the responses of a rendered text, as in Unsloth.

    Attributes:
      instruction_part: Begins a user turn; what follows it is not trained.
      response_part: Begins a response; what follows it is trained.
    """

    instruction_part: str
    response_part: str

    def __post_init__(self) -> None:
        if not (self.instruction_part and self.response_part):
            raise ConfigError("instruction_part and response_part must not be empty")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RenderedExample:
    """A text and the characters of it that are trained.

    Attributes:
      is_chat: A chat template wrote it.
      begins: BOS comes first, if the tokenizer adds it.
      ends: EOS comes last.
      trains_end: That EOS is trained.
    """

    text: str
    spans: tuple[Span, ...]
    is_chat: bool = False
    begins: bool = False
    ends: bool = False
    trains_end: bool = False
    note: str = ""


def rendered_example(
    example: Rendered,
    *,
    train_on: TrainOn = "auto",
    template: ChatTemplate | None = None,
    markers: ResponseMarkers | None = None,
) -> RenderedExample:
    """Returns the text of an example and its trained characters.

    Args:
      example: What to render.
      train_on: "auto" is all of a plain text, the completion, or assistant turns.
      template: Renders conversations.
      markers: Choose the trained characters instead, in any kind of example.

    Raises:
      ConfigError: `train_on` does not suit the kind of example.
      DataError: The chat template refuses the conversation.
    """
    rendered = _rendered(example, train_on, template)
    if markers is None:
        return rendered
    spans = response_spans(rendered.text, markers)
    ends = bool(spans) and spans[-1][1] == len(rendered.text)
    return dataclasses.replace(rendered, spans=spans, trains_end=ends)


def response_spans(text: str, markers: ResponseMarkers) -> tuple[Span, ...]:
    """Returns what stands between each response part and the next instruction part."""
    spans: list[Span] = []
    start = text.find(markers.response_part)
    while start >= 0:
        start += len(markers.response_part)
        end = text.find(markers.instruction_part, start)
        spans.append((start, end if end >= 0 else len(text)))
        start = text.find(markers.response_part, end) if end >= 0 else -1
    return tuple(spans)


def _rendered(
    example: Rendered, train_on: TrainOn, template: ChatTemplate | None
) -> RenderedExample:
    match example:
        case Text():
            _check(train_on, ("auto", "all"), "text")
            return RenderedExample(
                text=example.text,
                spans=((0, len(example.text)),),
                begins=example.is_start,
                ends=example.is_end,
                trains_end=True,
            )
        case Completion():
            _check(train_on, ("auto", "completion", "last", "all"), "prompt-completion")
            text = example.prompt + example.completion
            start = 0 if train_on == "all" else len(example.prompt)
            spans = ((start, len(text)),)
            return RenderedExample(
                text=text, spans=spans, begins=True, ends=True, trains_end=True
            )
        case Segments():
            _check(train_on, ("auto", "all"), "segments")
            return _rendered_segments(example, train_on)
        case Conversation():
            if template is None:
                raise DataError("messages need a chat template", where=example.where)
            return _rendered_chat(example, train_on, template)


def _rendered_chat(
    example: Conversation, train_on: TrainOn, template: ChatTemplate
) -> RenderedExample:
    allowed = ("auto", "assistant", "last", "all")
    allowed += ("completion",) if example.has_prompt else ()
    _check(train_on, allowed, "messages")
    if train_on == "all":
        text = template.render(example)
        spans, note = ((0, len(text)),), ""
    else:
        chat = template.render_spans(example)
        text, note = chat.text, chat.note
        spans = _unmuted(chat, example)
        spans = spans[-1:] if train_on == "last" else spans
    return RenderedExample(text=text, spans=spans, is_chat=True, note=note)


def _rendered_segments(example: Segments, train_on: TrainOn) -> RenderedExample:
    texts = [text for text, _ in example.pieces]
    ends = list(itertools.accumulate(map(len, texts)))
    spans = [
        (end - len(text), end)
        for (text, is_trained), end in zip(example.pieces, ends, strict=True)
        if is_trained or train_on == "all"
    ]
    return RenderedExample(text="".join(texts), spans=tuple(spans))


def _unmuted(chat: RenderedChat, example: Conversation) -> tuple[Span, ...]:
    if example.muted and any(span.turn is None for span in chat.spans):
        raise DataError(
            "some turns are not to be trained, and the marks of the chat template "
            "do not tell which is which",
            where=example.where,
            fix="remove its {% generation %} marks, or give another template",
        )
    kept = (span for span in chat.spans if span.turn not in example.muted)
    return tuple((span.start, span.end) for span in kept)


def _check(train_on: TrainOn, allowed: tuple[str, ...], kind: str) -> None:
    if train_on not in allowed:
        raise ConfigError(
            f"{train_on=} does not suit data in the format {kind}",
            fix=f"choose one of {', '.join(allowed)}",
        )
