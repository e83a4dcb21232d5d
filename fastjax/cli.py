"""The command line: flags to configurations, errors to four lines and an exit code.

Nothing heavy is imported before a command needs it, so that `--help` is quick.
"""

import dataclasses
import difflib
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from fastjax.cli_flags import Call, parsed, read_settings
from fastjax.config import DType
from fastjax.errors import ConfigError, FastJaxError, Interrupted, printable

_USAGE = """usage: fastjax COMMAND [flags]

  train                   train adapters, or every weight, on a data file
  evaluate                measure the loss of a model or adapter on a data file
  generate                answer prompts
  export                  merge an adapter into a Hugging Face model folder
  models                  list the presets
  make-random-checkpoint  write random weights of a preset's shapes
  bench-train             time the training step on random weights
  demo                    train a tiny model, then a QLoRA adapter on it

`fastjax COMMAND --help` lists the flags of a command. `--debug` shows tracebacks.
"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GenerateArgs:
    """Answers prompts with a model, with or without an adapter.

    Attributes:
      model: Folder of a model or adapter, preset name or hub name.
      prompt: One or more prompts, answered in one batch.
      max_new_tokens: Most tokens of an answer.
      temperature: 0 takes the likeliest token.
      top_k: Draw from so many of the likeliest tokens; 0: all.
      top_p: Draw from the likeliest tokens up to this probability.
      seed: Of the drawing.
      chat: Put the prompt into the model's chat template, when it has one.
      load_in_4bit: Hold the base weights in 4 bits.
      dtype: Of activations.
    """

    model: str
    prompt: tuple[str, ...]
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    chat: bool = True
    load_in_4bit: bool = True
    dtype: DType = "bfloat16"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ExportArgs:
    """Merges an adapter into its base model and writes a Hugging Face folder.

    Attributes:
      model: Folder of the adapter.
      output_dir: Folder that is made.
      base_precision: Merge onto the original 16-bit weights, or onto the 4-bit ones
        as they were in training.
      dtype: Of the written weights.
      overwrite: Replace the folder if it exists.
    """

    model: str
    output_dir: str
    base_precision: Literal["original", "dequantised"] = "original"
    dtype: DType = "bfloat16"
    overwrite: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelsArgs:
    """Lists the presets: name, family, hub id."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RandomCheckpointArgs:
    """Writes a checkpoint of a preset's shapes with random weights and a tokenizer.

    Attributes:
      model: Preset name.
      out: Folder that is made.
      dtype: Of the weights.
      seed: Of the weights.
    """

    model: str
    out: str
    dtype: DType = "bfloat16"
    seed: int = 0


def main() -> int:
    """Runs the command named first on the command line; returns the exit code."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(_USAGE)
        return 0
    return run(words[0], words[1:])


def run(command: str, words: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    Args:
      command: A name of the usage text.
      words: Its flags; None takes those of this process, a script of `scripts/`.
    """
    program = ["fastjax", command] if words is not None else ["python", sys.argv[0]]
    words = list(sys.argv[1:] if words is None else words)
    shows_traceback = "--debug" in words
    call = Call(program=tuple(program), words=tuple(w for w in words if w != "--debug"))
    try:
        _command(command)(call)
    except FastJaxError as error:
        sys.stderr.write(traceback.format_exc() if shows_traceback else f"{error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("interrupted before anything was done\n")
        return Interrupted.exit_code
    except SystemExit as stop:  # from tyro: help was shown, or a flag is wrong
        return stop.code if isinstance(stop.code, int) else 2
    return 0


def _command(name: str) -> "Callable[[Call], None]":
    if name in _COMMANDS:
        return _COMMANDS[name]
    near = difflib.get_close_matches(name, _COMMANDS, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(
        f"there is no command {printable(name)!r}{hint}",
        fix=f"use one of: {', '.join(_COMMANDS)}",
    )


def _api() -> Any:
    """Returns the API; imported late, after the settings of this process are made."""
    from fastjax import runtime

    runtime.configure()
    import fastjax.api

    return fastjax.api


def _train(call: Call) -> None:
    words = [word for word in call.words if word not in _PRINT_CONFIG]
    if _is_help(call, "train"):
        return
    settings = read_settings(words)
    if len(words) < len(call.words):
        from fastjax.config_file import config_yaml

        sys.stdout.write(config_yaml(settings.config))
        return
    from fastjax import runtime

    runtime.configure(full_determinism=settings.config.full_determinism)
    from fastjax.api import run_training

    run_training(
        settings.config, notes=settings.notes, resume_command=call.resume_command
    )


def _evaluate(call: Call) -> None:
    if _is_help(call, "evaluate"):
        return
    settings = read_settings(call.words)
    for note in settings.notes:
        sys.stderr.write(f"{note}\n")
    _write_yaml(_api().run_evaluation(settings.config))


def _generate(call: Call) -> None:
    args = parsed(GenerateArgs, call)
    api = _api()
    from fastjax.inference.sampling import Sampling

    answers = api.run_generation(
        args.model,
        args.prompt,
        sampling=Sampling(
            temperature=args.temperature, top_k=args.top_k, top_p=args.top_p
        ),
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        uses_chat_template=args.chat,
        load_in_4bit=args.load_in_4bit,
        dtype=args.dtype,
        stream=sys.stdout.write if len(args.prompt) == 1 else None,
    )
    for prompt, answer in zip(args.prompt, answers, strict=True):
        if len(args.prompt) > 1:
            sys.stdout.write(f"> {prompt}\n{answer}")
        sys.stdout.write("\n")


def _export(call: Call) -> None:
    args = parsed(ExportArgs, call)
    for line in _api().run_export(
        args.model,
        Path(args.output_dir),
        base_precision=args.base_precision,
        dtype=args.dtype,
        overwrite=args.overwrite,
    ):
        sys.stdout.write(line + "\n")


def _models(call: Call) -> None:
    from fastjax.models.registry import PRESETS

    parsed(ModelsArgs, call)
    for name, preset in sorted(PRESETS.items()):
        source = preset.hub_id or "random weights (no download)"
        sys.stdout.write(f"{name:28} {preset.config.family:8} {source}\n")


def _make_random_checkpoint(call: Call) -> None:
    args = parsed(RandomCheckpointArgs, call)
    folder = _api().make_random_checkpoint(
        args.model, Path(args.out), dtype=args.dtype, seed=args.seed
    )
    sys.stdout.write(f"{folder}\n")


def _bench_train(call: Call) -> None:
    from fastjax.api.benchmark import BenchmarkArgs, run_benchmark

    _write_yaml(run_benchmark(parsed(BenchmarkArgs, call)))


def _demo(call: Call) -> None:
    _api()
    from fastjax.demo import DemoArgs, run_demo

    run_demo(parsed(DemoArgs, call))


def _is_help(call: Call, command: str) -> bool:
    if "-h" not in call.words and "--help" not in call.words:
        return False
    from fastjax.cli_help import settings_help

    sys.stdout.write(settings_help(command))
    return True


def _write_yaml(values: dict[str, Any]) -> None:
    import yaml

    sys.stdout.write(yaml.safe_dump(values, sort_keys=False))


_PRINT_CONFIG = ("--print_config", "--print-config")
_COMMANDS: dict[str, Callable[[Call], None]] = {
    "train": _train,
    "evaluate": _evaluate,
    "generate": _generate,
    "export": _export,
    "models": _models,
    "make-random-checkpoint": _make_random_checkpoint,
    "bench-train": _bench_train,
    "demo": _demo,
}
