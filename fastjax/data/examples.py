"""What a training example is, whatever file or object it came from."""

import dataclasses

Message = dict[str, object]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """A plain text; every token is trained.

    Attributes:
      where: File and line, or row number, for messages.
    """

    text: str
    where: str = ""


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


Example = Text | Completion | Conversation
