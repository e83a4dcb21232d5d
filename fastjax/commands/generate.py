"""`fastjax generate`: answers to prompts."""

import dataclasses
import sys

from fastjax import runtime
from fastjax.cli_flags import Call, parsed, write_now
from fastjax.config import DType, QuantConfig


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GenerateArgs:
    """Answers prompts with a model, with or without an adapter.

    Attributes:
      model: Folder of a model or adapter, preset name or hub name.
      prompt: One or more prompts, answered in one batch.
      max_new_tokens: Most tokens of an answer.
      temperature: 0 takes the likeliest token; 1 draws as the model says, below it more
        surely.
      top_k: Draw from so many of the likeliest tokens; 0: all.
      top_p: Draw from the likeliest tokens up to this probability.
      seed: Of the tokens that are drawn.
      chat: Put the prompt into the model's chat template, when it has one.
      load_in_4bit: Hold the base weights in 4 bits.
      load_in_8bit: Hold them in 8 bits instead.
      dtype: Of activations and matrix products.
    """

    model: str = dataclasses.field(metadata={"positional": True})
    prompt: tuple[str, ...]
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    chat: bool = True
    load_in_4bit: bool = True
    load_in_8bit: bool = False
    dtype: DType = "bfloat16"


def run(call: Call) -> None:
    """Prints the answers; a single one as it comes."""
    args = parsed(GenerateArgs, call)
    runtime.configure(gpu="as needed")
    from fastjax.terminal import open_console, say

    say(open_console(), f"loading {args.model}")
    from fastjax.api import run_generation
    from fastjax.inference.sampling import Sampling

    streams = len(args.prompt) == 1
    answers = run_generation(
        args.model,
        args.prompt,
        sampling=Sampling(
            temperature=args.temperature, top_k=args.top_k, top_p=args.top_p
        ),
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        uses_chat_template=args.chat,
        quant=QuantConfig.asked(
            load_in_4bit=args.load_in_4bit, load_in_8bit=args.load_in_8bit
        ),
        dtype=args.dtype,
        stream=write_now if streams else None,
    )
    for prompt, answer in zip(args.prompt, answers, strict=True):
        sys.stdout.write("\n" if streams else f"> {prompt}\n{answer}\n")
