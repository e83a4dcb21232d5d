"""What a training example is, whatever file or object it came from."""

import dataclasses

Message = dict[str, object]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """A plain text; every token is trained.

    Attributes:
      where: File and line, or row number, for messages.
      is_start: Nothing of the same text comes before it.
      is_end: Nothing of the same text comes after it.
    """

    text: str
    where: str = ""
    is_start: bool = True
    is_end: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """A prompt that is read and a completion that is trained, joined as they are."""

    prompt: str
    completion: str
    where: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """Messages for a chat template; assistant turns are trained.

    Attributes:
      messages: Each holds "role", "content" and, when it has them, "tool_calls",
        "tool_call_id", "name", "reasoning_content".
      tools: JSON schemas of the tools that the assistant may call.
      muted: Indices of assistant messages that are not trained.
      has_prompt: The muted turns are the prompt of a prompt-completion row.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, object], ...] = ()
    muted: frozenset[int] = frozenset()
    has_prompt: bool = False
    where: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Segments:
    """Pieces of a text that are trained or only read; nothing is added to them."""

    pieces: tuple[tuple[str, bool], ...]
    where: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """Tokens as they are, and which of them are trained."""

    input_ids: tuple[int, ...]
    trained: tuple[bool, ...]
    where: str = ""


Example = Text | Completion | Conversation | Segments | Tokens
