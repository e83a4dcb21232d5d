"""The step that a thread compiles on shapes while weights are read."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from fastjax.config import DataConfig, LoRAConfig
from fastjax.remat import RematPlan
from fastjax.train.ahead import StepsAhead, settings_of, steps_of
from fastjax.train.batches import put_batch
from fastjax.train.start import shapes


def test_a_run_takes_the_steps_made_beforehand(
    tiny: SimpleNamespace, tmp_path: Path
) -> None:
    rescue = str(tmp_path / "rescue")
    notes: list[str] = []
    ahead = StepsAhead(_job(tiny, fallback_dir=rescue), notes.append)

    def adapter(name: str, **changes: Any) -> bytes:
        tiny.train(tmp_path / name, job=changes, fallback_dir=rescue)
        return (tmp_path / name / "adapter_model.bytes").read_bytes()

    taken: list[Any] = []

    def steps(job: Any) -> Any:
        taken.append(ahead.steps(job))
        return taken[-1]

    assert adapter("ahead", steps_ahead=steps) == adapter("plain")
    assert taken[0] is not None
    assert notes == ["compiling the step (about a minute once per shape)"]
    other = {"steps_ahead": steps, "head_is_trainable": True}
    assert adapter("other", **other) == adapter("plain")
    assert taken[1] is None


def _job(tiny: SimpleNamespace, **changes: Any) -> Any:
    """Returns the tiny job with shapes in the place of weights."""
    graphdef, *weights = tiny.split()
    trainable, frozen = jax.eval_shape(lambda: weights)
    config = tiny.config(**changes)
    return tiny.Job(
        config=config,
        graphdef=graphdef,
        trainable=trainable,
        frozen=frozen,
        train_loader=tiny.TinyLoader(),
        output_dir=Path(),
        remat=RematPlan(policies=(config.remat,)),
    )


def _program(job: Any) -> str:
    steps = steps_of(job, lambda _: None)
    batch = put_batch(job.train_loader, 0)
    return steps._jitted.lower(shapes(job), job.frozen, batch.arrays).as_text()


@pytest.mark.parametrize(
    "settings",
    [
        {"save_steps": 7, "save_total_limit": 9, "logging_steps": 3, "eval_steps": 5},
        {"eval_strategy": "no", "data_seed": 3, "memory_gib": 7.0, "run_name": "b"},
        {"data": DataConfig(dataset_name="rows.jsonl", val_set_size=3, packing=True)},
        {"per_device_eval_batch_size": 3, "resume_from_checkpoint": "no"},
    ],
)
def test_what_leaves_the_program_alone_is_in_no_key(
    settings: dict[str, Any], tiny: SimpleNamespace
) -> None:
    plain, other = _job(tiny), _job(tiny, **settings)
    assert plain.config != other.config
    assert settings_of(plain) == settings_of(other)
    assert _program(plain) == _program(other)


@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": 0.5},
        {"max_grad_norm": 0.0},
        {"max_steps": 999},
        {"seed": 5},
        {"lora": LoRAConfig()},
    ],
)
def test_what_changes_the_program_is_in_the_key(
    settings: dict[str, Any], tiny: SimpleNamespace
) -> None:
    plain, other = _job(tiny), _job(tiny, **settings)
    assert _program(plain) != _program(other)
    assert settings_of(plain) != settings_of(other)


def test_noise_is_in_the_key(tiny: SimpleNamespace) -> None:
    noisy = _job(tiny, data=DataConfig(neftune_noise_alpha=5.0))
    assert settings_of(_job(tiny)) != settings_of(noisy)
