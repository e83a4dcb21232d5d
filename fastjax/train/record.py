"""What a run writes down of itself: settings, versions, machine, choices."""

import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from typing import Any

import jax

import fastjax
from fastjax.config import Implementations, ReportConfig, TrainConfig
from fastjax.remat import RematPlan

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")

# Settings that leave the mathematics alone, or that another entry decides: the length
# of the run by total_steps, the rows by the fingerprint of the data.
_FREE = frozenset(
    {
        "output_dir",
        "remat",
        "unroll_layers",
        "full_determinism",
        "per_device_eval_batch_size",
        "logging_steps",
        "logging_first_step",
        "eval_strategy",
        "eval_steps",
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "resume_from_checkpoint",
        "allow_config_change",
        "max_steps",
        "num_train_epochs",
        "dataset_name",
        "dataset_text_field",
        "dataset_weights",
        "use_dataset_cache",
        "eval_dataset_name",
        "dataset_train_split",
        "dataset_test_split",
        "column_map",
        "max_train_samples",
        "skip_bad_rows",
        "memory_gib",
        *(field.name for field in dataclasses.fields(Implementations)),
        *(field.name for field in dataclasses.fields(ReportConfig)),
    }
)


def settings(config: TrainConfig) -> dict[str, Any]:
    """Returns every field of the config, flat, as JSON holds it."""
    flat: dict[str, Any] = {}
    for name, value in dataclasses.asdict(config).items():
        flat.update(value if isinstance(value, dict) else {name: value})
    return json.loads(json.dumps(flat))


def identity(
    config: TrainConfig, total_steps: int, *, data: str, base: str
) -> dict[str, Any]:
    """Returns what a resumed run must share with the run that it continues.

    Args:
      config: Of the run.
      total_steps: Its length, which shapes the schedule.
      data: Fingerprint of the batches.
      base: Fingerprint of the base model; an empty one is left out.
    """
    fixed = {k: v for k, v in settings(config).items() if k not in _FREE}
    fingerprints = {"data": data} | ({"base": base} if base else {})
    return {**fixed, "total_steps": total_steps, **fingerprints}


def environment(config: TrainConfig, remat: RematPlan | None = None) -> dict[str, Any]:
    """Returns what the last bits of a result may depend on.

    Args:
      config: Of the run.
      remat: The plan that it took.
    """
    devices = jax.devices()
    return {
        "fastjax": fastjax.__version__,
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "device": devices[0].device_kind,
        "device_count": len(devices),
        "remat": str(remat or config.remat),
        **{
            f"implementation of {op}": name
            for op, name in dataclasses.asdict(config.implementations).items()
        },
    }


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any]
) -> list[tuple[str, str, str]]:
    """Returns (name, before, now) of entries that both have and that differ."""
    return [
        (name, str(before[name]), str(now[name]))
        for name in now
        if name in before and before[name] != now[name]
    ]
