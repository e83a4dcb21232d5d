"""What a sweep trains: the adapters of a list of changes, and which go together."""

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastjax import lora as adapters
from fastjax.api.loaders import data_seed
from fastjax.config import LoRAConfig, TrainConfig
from fastjax.errors import ConfigError, printable
from fastjax.flat_config import FlatConfig, train_config
from fastjax.models.build import DecoderSpec

VARIED = (
    *("learning_rate", "seed"),
    *(f.name for f in dataclasses.fields(LoRAConfig) if f.name != "auto_rank"),
)
_MOST_LETTERS, _HASH_DIGITS = 120, 8


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SweepRun:
    """One adapter of a sweep.

    Attributes:
      name: Made of its changes, a long one cut to end in a hash; that of its folder.
      changes: Fields and their values.
      config: All settings; `fastjax train` with them trains the same adapter alone.
    """

    name: str
    changes: dict[str, Any]
    config: TrainConfig

    @property
    def folder(self) -> Path:
        """Where its result goes."""
        return Path(str(self.config.output_dir))


def grid(values: Mapping[str, Iterable[Any]]) -> list[dict[str, Any]]:
    """Returns every combination of the values of some fields."""
    return [
        dict(zip(values, chosen, strict=True))
        for chosen in itertools.product(*values.values())
    ]


def sweep_runs(
    config: TrainConfig, changes: Sequence[Mapping[str, Any]], folder: Path
) -> list[SweepRun]:
    """Returns the runs of a sweep, all with the data in the same order.

    Raises:
      ConfigError: Names everything that a sweep cannot do.
    """
    problems = [text for is_wrong, text in _refused(config) if is_wrong]
    problems += [] if changes else ["a sweep needs changes to try"]
    shared = dataclasses.replace(config, data_seed=data_seed(config))
    runs: dict[str, SweepRun] = {}
    for change in changes:
        name = _name(change)
        unknown = [field for field in change if field not in VARIED]
        if unknown:
            problems.append(
                f"a sweep varies adapters, learning_rate and seed, not {unknown[0]}"
            )
            continue
        if name in runs:
            problems.append(f"{printable(name)} comes twice")
        try:
            found = train_config(change, base=FlatConfig(config=shared)).config
        except ConfigError as error:
            problems += error.problems or (error.what,)
            continue
        own = dataclasses.replace(found, output_dir=str(folder / name))
        runs[name] = SweepRun(name=name, changes=dict(change), config=own)
    if problems:
        raise ConfigError.of(list(dict.fromkeys(problems)))
    return list(runs.values())


def trained_together(
    spec: DecoderSpec, runs: Sequence[SweepRun]
) -> list[list[SweepRun]]:
    """Returns the runs in groups whose adapters have equal shapes.

    Args:
      spec: Structure of the base model.
      runs: In any order, which groups keep.

    Raises:
      ConfigError: Targets match nothing in the model.
    """
    groups: dict[str, list[SweepRun]] = {}
    for run in runs:
        groups.setdefault(_shape(spec, run.config.lora), []).append(run)
    return list(groups.values())


def _shape(spec: DecoderSpec, lora: LoRAConfig) -> str:
    """Returns what decides the arrays of an adapter, as a key."""
    adapted = adapters.adapted_spec(spec, lora)
    kinds = {
        name: dataclasses.replace(kind, scaling=1.0)
        for name, kind in adapted.adapters.items()
    }
    beside = (adapted.trained_biases, adapted.trained_tables, adapted.trained_tokens)
    return repr((sorted(kinds.items(), key=lambda kind: kind[0]), *map(sorted, beside)))


def _refused(config: TrainConfig) -> list[tuple[bool, str]]:
    report = config.report
    return [
        (config.full_finetuning, "a sweep trains adapters: drop full_finetuning"),
        (config.remat == "auto", "a sweep needs a remat policy: set remat to another"),
        (
            config.optimizer.optim == "adamw_8bit",
            "a sweep has no adamw_8bit: set optim to adamw",
        ),
        (
            config.optimizer.offload_optimizer,
            "a sweep keeps its optimisers' states: drop offload_optimizer",
        ),
        (
            report.load_best_model_at_end or report.early_stopping_patience > 0,
            "a sweep keeps the last weights: drop load_best_model_at_end and "
            "early_stopping_patience",
        ),
        (
            report.sample_prompts is not None or report.push_to_hub,
            "a sweep neither answers sample_prompts nor uploads: do it with the best",
        ),
        (
            bool(config.data.new_tokens) or config.lora.auto_rank,
            "a sweep takes vocabulary and ranks as they are: drop new_tokens and "
            "auto_rank",
        ),
    ]


def _name(changes: Mapping[str, Any]) -> str:
    parts = [
        f"{name}-{'+'.join(map(str, value)) if _is_list(value) else value}"
        for name, value in changes.items()
    ]
    name = re.sub(r"[^\w.+-]+", "_", "_".join(parts)) or "unchanged"
    if len(name) <= _MOST_LETTERS:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:_HASH_DIGITS]
    return f"{name[: _MOST_LETTERS - _HASH_DIGITS - 1]}-{digest}"


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)
