"""Optimiser states in host memory: the same updates, in another place."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastjax.config import OptimizerConfig
from fastjax.train import checkpoint, host_states
from fastjax.train.host_states import bytes_by_place
from fastjax.train.optimizer import Optimizer, make_optimizer
from fastjax.train.state import TrainState, abstract_state, init_state
from fastjax.train.step import make_train_step

pytestmark = pytest.mark.usefixtures("optimised")

SIZES = {"table": (127, 1024), "deep": (3, 128, 256), "bias": (5,)}
SCALES = (1.0, 0.0, 2.0)
"""Of the loss by step; at 0 it is not finite."""


def _loss(trainable: Any, frozen: Any, batch: Any, *, dropout_key: Any) -> Any:
    del frozen, dropout_key
    scale = batch["x"].astype(jnp.float32).mean()
    total = sum(jnp.sum((leaf - scale) ** 2) for leaf in jax.tree.leaves(trainable))
    return total / scale, jnp.float32(1.0)


def _start(optim: Any, *, offload: bool) -> tuple[Optimizer, TrainState]:
    config = OptimizerConfig(
        optim=optim,
        learning_rate=0.01,
        weight_decay=0.1,
        warmup_steps=0,
        offload_optimizer=offload,
    )
    weights = {
        name: jax.random.normal(jax.random.key(index), shape)
        for index, (name, shape) in enumerate(SIZES.items())
    }
    optimizer = make_optimizer(config, len(SCALES))
    return optimizer, init_state(weights, optimizer, "float32")


def _places(tree: Any) -> set[tuple[bool, str | None]]:
    return {
        (leaf.size >= 2**16, leaf.sharding.memory_kind)
        for leaf in jax.tree.leaves(tree)
    }


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
def test_updates_are_those_of_states_on_the_device(
    optim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_states, "PIECE_BYTES", 2**17)
    ends = []
    for offload in (False, True):
        optimizer, state = _start(optim, offload=offload)
        step = make_train_step(_loss, optimizer, seed=0)
        skipped = []
        for scale in SCALES:
            batch = {"x": jnp.full((1, 1, 4), scale).astype(jnp.int32)}
            state, metrics = step(state, {}, batch)
            skipped.append(float(metrics["skipped"]))
        assert skipped == [0.0, 1.0, 0.0]
        ends.append(state)
    plain, waiting = ends
    for name in SIZES:
        actual, expected = waiting.trainable[name], plain.trainable[name]
        assert jnp.allclose(actual, expected, rtol=1e-6, atol=1e-7), name

    table = waiting.opt_state[1][sorted(SIZES).index("table")]
    assert {len(leaf) for leaf in jax.tree.leaves(table) if leaf.ndim > 1} <= {4}
    kinds = ({leaf.dtype for leaf in jax.tree.leaves(e.opt_state)} for e in ends)
    assert next(kinds) == next(kinds)
    on_device, on_host = bytes_by_place(waiting.opt_state)
    assert on_host > 20 * on_device
    folder = checkpoint.save(tmp_path, waiting, {}, step=3, write_adapter=None, keep=1)
    record = json.loads((folder / checkpoint.RECORD_NAME).read_text())
    like = abstract_state(waiting.trainable, optimizer, "float32")
    found = checkpoint.read_state(folder, like, record)
    assert _places(found.opt_state) == _places(waiting.opt_state)
    for actual, expected in zip(*map(jax.tree.leaves, (found, waiting)), strict=True):
        np.testing.assert_array_equal(np.asarray(actual), np.asarray(expected))


def test_a_step_compiled_on_shapes_takes_the_states() -> None:
    optimizer, state = _start("adamw", offload=True)
    like = abstract_state(state.trainable, optimizer, "float32")
    batch = {"x": jnp.ones((1, 1, 4), jnp.int32)}
    jitted: Any = make_train_step(_loss, optimizer, seed=0)
    step = jitted.lower(like, {}, batch).compile()
    state, _ = step(state, {}, batch)
    state, metrics = step(state, {}, batch)
    assert float(metrics["skipped"]) == 0.0
    assert _places(state.opt_state) == {(True, "pinned_host"), (False, "device")}


def test_large_states_alone_wait_on_the_host() -> None:
    _, state = _start("adamw", offload=True)
    assert _places(state.opt_state) == {(True, "pinned_host"), (False, "device")}
    assert {kind for _, kind in _places(state.trainable)} == {"device"}
