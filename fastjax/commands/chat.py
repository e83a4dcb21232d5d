"""`fastjax chat`: a talk with a model, on a terminal or through a pipe."""

import dataclasses
import sys
from typing import TYPE_CHECKING

from fastjax import runtime
from fastjax.cli_flags import Call, parsed, write_now
from fastjax.config import DType, QuantConfig

if TYPE_CHECKING:
    from fastjax.api.chat import Conversation

_PROMPT = "\n> "
_HINT = (
    "type a message; /reset forgets the talk, /exit or Ctrl-D ends it, Ctrl-C stops an "
    "answer\n"
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ChatArgs:
    """Talks with a model, with or without an adapter, turn by turn.

    In a pipe each line is a turn, and the answers alone are printed.

    Attributes:
      model: Folder of a model or adapter, preset name or hub name.
      system: A first message that stays.
      max_new_tokens: Most tokens of an answer.
      temperature: 0 takes the likeliest token; 1 draws as the model says, below it more
        surely.
      top_k: Draw from so many of the likeliest tokens; 0: all.
      top_p: Draw from the likeliest tokens up to this probability.
      seed: Of the tokens that are drawn.
      load_in_4bit: Hold the base weights in 4 bits.
      load_in_8bit: Hold them in 8 bits instead.
      dtype: Of activations and matrix products.
    """

    model: str = dataclasses.field(metadata={"positional": True})
    system: str = ""
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    load_in_4bit: bool = True
    load_in_8bit: bool = False
    dtype: DType = "bfloat16"


def run(call: Call) -> None:
    """Answers turns until there are no more."""
    args = parsed(ChatArgs, call)
    runtime.configure(gpu="as needed")
    from fastjax.terminal import open_console, say

    say(open_console(), f"loading {args.model}")
    from fastjax.api import Conversation, load_model
    from fastjax.inference.sampling import Sampling

    quant = QuantConfig.asked(
        load_in_4bit=args.load_in_4bit, load_in_8bit=args.load_in_8bit
    )
    conversation = Conversation(
        load_model(args.model, dtype=args.dtype, quant=quant),
        system=args.system,
        sampling=Sampling(
            temperature=args.temperature, top_k=args.top_k, top_p=args.top_p
        ),
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
    )
    if not conversation.has_template:
        sys.stderr.write("the model has no chat template: it continues each line\n")
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        sys.stderr.write(_HINT)
    while (text := _next_turn(is_terminal=is_terminal)) is not None:
        if text == "/exit":
            return
        try:
            _answer(conversation, text)
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            write_now("\n")


def _next_turn(*, is_terminal: bool) -> str | None:
    """Returns the user's words, None at the end of the talk."""
    if is_terminal:
        import readline  # noqa: F401  # arrow keys and history for input()

        try:
            return input(_PROMPT).strip()
        except (EOFError, KeyboardInterrupt):
            return None
    line = sys.stdin.readline()
    return line.strip() if line else None


def _answer(conversation: "Conversation", text: str) -> None:
    if text == "/reset":
        conversation.reset()
    elif text:
        conversation.say(text, stream=write_now)
        write_now("\n")
