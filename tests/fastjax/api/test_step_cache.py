"""Compiled steps that another process may take up."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from fastjax.api.step_cache import StepCache
from fastjax.config import TrainConfig
from fastjax.train.compiled import CompiledStep, StepMemory

MEMORY = StepMemory(argument_bytes=1, output_bytes=2, alias_bytes=3, temp_bytes=4)


def _step(state: Any, frozen: Any, batch: Any) -> Any:
    moved = jax.tree.map(lambda leaf: leaf * frozen + batch["ids"].sum(), state)
    return moved, {"loss": moved["b"].sum(), "grad_norm": jnp.float32(3.0)}


@pytest.fixture
def arguments() -> tuple[Any, ...]:
    state = {"b": jnp.arange(4.0), "a": jnp.ones((2, 3))}
    return state, jnp.float32(2.0), {"ids": jnp.arange(6, dtype=jnp.float32)}


def _cache(folder: Path, **described: Any) -> StepCache:
    return StepCache(folder, {"settings": TrainConfig(model="tiny"), **described})


def test_a_step_is_found_by_all_that_decides_about_it(
    tmp_path: Path, arguments: tuple[Any, ...]
) -> None:
    run = jax.jit(_step).lower(*arguments).compile()
    made = CompiledStep(run=run, memory=MEMORY, implementations={"rope": ["xla"]})
    assert _cache(tmp_path).load(arguments) is None
    _cache(tmp_path)._write(arguments, made)
    found = _cache(tmp_path).load(jax.eval_shape(lambda: arguments))
    assert found is not None
    (path,) = tmp_path.iterdir()
    path.chmod(0o664)  # anybody of the group may have written it
    assert _cache(tmp_path).load(arguments) is None
    path.chmod(0o600)
    assert (found.memory, found.implementations) == (MEMORY, {"rope": ["xla"]})
    actual, expected = found.run(*arguments), run(*arguments)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    assert all(map(jnp.array_equal, *map(jax.tree.leaves, (actual, expected))))
    assert _cache(tmp_path, documents=2).load(arguments) is None
    longer = (*arguments[:2], {"ids": jnp.zeros(7)})
    assert _cache(tmp_path).load(longer) is None


def test_a_damaged_step_is_none(tmp_path: Path, arguments: tuple[Any, ...]) -> None:
    run = jax.jit(_step).lower(*arguments).compile()
    made = CompiledStep(run=run, memory=None, implementations={})
    _cache(tmp_path)._write(arguments, made)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    assert _cache(tmp_path).load(arguments) is None
    path.write_bytes(content[:-9])
    assert _cache(tmp_path).load(arguments) is None


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("jax_default_prng_impl", "rbg"),
        ("jax_default_matmul_precision", "highest"),
        ("jax_threefry_partitionable", False),
    ],
)
def test_another_setting_of_jax_is_another_step(
    option: str, value: Any, tmp_path: Path, arguments: tuple[Any, ...]
) -> None:
    run = jax.jit(_step).lower(*arguments).compile()
    made = CompiledStep(run=run, memory=None, implementations={})
    _cache(tmp_path)._write(arguments, made)
    given = jax.config.values[option]
    jax.config.update(option, value)
    try:
        assert _cache(tmp_path).load(arguments) is None
    finally:
        jax.config.update(option, given)
    assert _cache(tmp_path).load(arguments) is not None
