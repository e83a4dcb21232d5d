"""The command line: flags to configurations, errors to four lines and an exit code.

Nothing heavy is imported before a command needs it, so that `--help` is quick.
"""

import dataclasses
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import tyro
import yaml

from fastjax.config import DType, TrainConfig
from fastjax.errors import ConfigError, FastJaxError, printable
from fastjax.flat_config import flat_values, train_config

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
      words: Its flags; None takes those of this process.
    """
    words = list(sys.argv[1:] if words is None else words)
    shows_traceback = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        if command not in _COMMANDS:
            raise ConfigError(
                f"there is no command {printable(command)!r}",
                fix=f"use one of: {', '.join(_COMMANDS)}",
            )
        _COMMANDS[command](words)
    except FastJaxError as error:
        if shows_traceback:
            traceback.print_exc()
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


def read_train_config(words: Sequence[str]) -> tuple[TrainConfig, list[str]]:
    """Returns the configuration of flags and of the YAML file that they may name.

    A flag wins over the file. Notes say which values were translated.

    Raises:
      ConfigError: A flag, key or value is wrong; it names all of them.
    """
    flags = _flags(words)
    path = flags.pop("config", None)
    base, notes = TrainConfig(), []
    if path is not None:
        base, notes = train_config(_yaml(Path(path)))
    config, more = train_config(flags, base=base)
    return config, notes + more


def _flags(words: Sequence[str]) -> dict[str, object]:
    """Returns flag names and their text values; a flag without a value is true."""
    flags: dict[str, object] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, has_value, value = word[2:].partition("=")
            name = name.replace("-", "_")
            if not has_value and name.startswith("no_"):
                name, value, has_value = name.removeprefix("no_"), "False", "="
            if name in flags:
                raise ConfigError(f"--{printable(name)} is given twice")
            flags[name] = value if has_value else True
        elif not name:
            raise ConfigError(
                f"{printable(word)!r} is no flag", fix="flags begin with --"
            )
        else:
            given = flags[name]
            flags[name] = word if given is True else f"{given},{word}"
    return flags


def _yaml(path: Path) -> dict[str, object]:
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except OSError as error:
        raise ConfigError(
            f"the config cannot be read: {error.strerror}", where=str(path)
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the config is not YAML: {printable(error)}", where=str(path)
        ) from error
    if not isinstance(loaded, dict):
        raise ConfigError("the config is not a list of keys", where=str(path))
    return {str(key): value for key, value in loaded.items()}


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe loader, which refuses a key that is given twice."""

    def construct_mapping(
        self, node: yaml.MappingNode, deep: bool = False
    ) -> dict[object, object]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {str(name) for name in names if names.count(name) > 1}
        if twice:
            raise yaml.YAMLError(f"given twice: {', '.join(sorted(twice))}")
        return super().construct_mapping(node, deep)


def _train(words: Sequence[str]) -> None:
    if _asks_help(words, TrainConfig, "train"):
        return
    config, notes = read_train_config([w for w in words if w != "--print_config"])
    if "--print_config" in words:
        sys.stdout.write(yaml.safe_dump(flat_values(config), sort_keys=False))
        return
    from fastjax.api import run_training

    run_training(config, notes=notes)


def _evaluate(words: Sequence[str]) -> None:
    if _asks_help(words, TrainConfig, "evaluate"):
        return
    config, _ = read_train_config(words)
    from fastjax.api import run_evaluation

    metrics = run_evaluation(config)
    sys.stdout.write(yaml.safe_dump(metrics, sort_keys=False))


def _generate(words: Sequence[str]) -> None:
    args = tyro.cli(GenerateArgs, args=words, prog="fastjax generate")
    from fastjax.api import run_generation
    from fastjax.inference.sampling import Sampling

    answers = run_generation(
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


def _export(words: Sequence[str]) -> None:
    args = tyro.cli(ExportArgs, args=words, prog="fastjax export")
    from fastjax.api import run_export

    for line in run_export(
        args.model,
        Path(args.output_dir),
        base_precision=args.base_precision,
        dtype=args.dtype,
        overwrite=args.overwrite,
    ):
        sys.stdout.write(line + "\n")


def _models(words: Sequence[str]) -> None:
    from fastjax.models.registry import PRESETS

    del words
    for name, preset in sorted(PRESETS.items()):
        source = preset.hub_id or "random weights (no download)"
        sys.stdout.write(f"{name:28} {preset.config.family:8} {source}\n")


def _make_random_checkpoint(words: Sequence[str]) -> None:
    args = tyro.cli(RandomCheckpointArgs, args=words, prog="make_random_checkpoint")
    from fastjax.api import make_random_checkpoint

    folder = make_random_checkpoint(
        args.model, Path(args.out), dtype=args.dtype, seed=args.seed
    )
    sys.stdout.write(f"{folder}\n")


def _bench_train(words: Sequence[str]) -> None:
    from fastjax.api.benchmark import BenchmarkArgs, run_benchmark

    result = run_benchmark(tyro.cli(BenchmarkArgs, args=words, prog="bench_train"))
    sys.stdout.write(yaml.safe_dump(result, sort_keys=False))


def _demo(words: Sequence[str]) -> None:
    from fastjax.demo import DemoArgs, run_demo

    run_demo(tyro.cli(DemoArgs, args=words, prog="demo"))


def _asks_help(words: Sequence[str], config: type, command: str) -> bool:
    if "-h" not in words and "--help" not in words:
        return False
    flat = tyro.conf.OmitArgPrefixes[tyro.conf.OmitSubcommandPrefixes[config]]
    tyro.cli(flat, args=["--help"], prog=f"fastjax {command}")
    return True


_COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": _train,
    "evaluate": _evaluate,
    "generate": _generate,
    "export": _export,
    "models": _models,
    "make-random-checkpoint": _make_random_checkpoint,
    "bench-train": _bench_train,
    "demo": _demo,
}
