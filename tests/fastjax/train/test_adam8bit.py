"""AdamW with 8-bit states: which arrays have them, and that they are kept exactly."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from fastjax.config import Optimizer as OptimizerName
from fastjax.config import OptimizerConfig
from fastjax.train import adam8bit, checkpoint, init_state, make_optimizer
from fastjax.train.adam8bit import MIN_ELEMENTS, scale_by_adam8bit
from kernels.adam8bit import Blocks
from kernels.cross_entropy import linear_cross_entropy
from kernels.numerics import relative_error


def scalers() -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    options = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}
    return scale_by_adam8bit(**options), optax.scale_by_adam(**options)


def test_small_arrays_keep_float32_states() -> None:
    ours, exact = scalers()
    key = jax.random.key(0)
    tree = {
        "large": jax.random.normal(key, (MIN_ELEMENTS,)),
        "small": jax.random.normal(key, (MIN_ELEMENTS - 1,)),
    }
    state, expected_state = ours.init(tree), exact.init(tree)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(2):
            direction, state = jax.jit(ours.update)(tree, state)
            expected, expected_state = jax.jit(exact.update)(tree, expected_state)
    np.testing.assert_allclose(direction["small"], expected["small"], rtol=1e-6)
    assert 1e-4 < relative_error(direction["large"], expected["large"]) < 0.05
    blocks = [
        leaf
        for leaf in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, Blocks))
        if isinstance(leaf, Blocks)
    ]
    assert [block.codes.size for block in blocks] == [MIN_ELEMENTS] * 2


def test_the_loss_falls_as_with_float32_states(
    tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adam8bit, "MIN_ELEMENTS", 1)
    graphdef, start, frozen = tiny.split()
    batch = {name: jnp.asarray(rows) for name, rows in tiny.rows(3, 16).items()}

    def loss(trainable: nnx.State) -> jax.Array:
        model = nnx.merge(graphdef, trainable, frozen)
        hidden = model(batch["input_ids"], positions=batch["positions"])
        total, count = linear_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]),
            model.head_weight(),
            batch["targets"].reshape(-1),
        )
        return total / count

    def losses(name: OptimizerName) -> np.ndarray:
        config = OptimizerConfig(
            optim=name, learning_rate=0.03, lr_scheduler_type="constant"
        )
        optimizer = make_optimizer(config, 60)

        def step(carry: tuple, index: jax.Array) -> tuple[tuple, jax.Array]:
            trainable, state = carry
            value, gradients = jax.value_and_grad(loss)(trainable)
            return optimizer.update(gradients, state, trainable, index), value

        carry = (start, optimizer.init(start))
        return np.asarray(jax.lax.scan(step, carry, jnp.arange(60))[1])

    exact, ours = losses("adamw"), losses("adamw_8bit")
    assert exact[-1] < 0.7 * exact[0]
    assert (ours != exact).any()
    np.testing.assert_allclose(ours, exact, rtol=0.02)


def test_a_checkpoint_keeps_every_bit(tmp_path: Path) -> None:
    optimizer = make_optimizer(OptimizerConfig(optim="adamw_8bit"), 10)
    tree = {"w": jax.random.normal(jax.random.key(0), (64, 65)), "b": jnp.ones((3,))}
    state = init_state(tree, optimizer, "float32")
    _, after = jax.jit(optimizer.update)(tree, state.opt_state, tree, jnp.int32(5))
    state = dataclasses.replace(state, opt_state=after)
    folder = checkpoint.save(tmp_path, state, {}, step=1, write_adapter=None, keep=1)
    record = json.loads((folder / checkpoint.RECORD_NAME).read_text())
    found = checkpoint.read_state(folder, state, record)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    assert any(leaf.dtype == jnp.uint8 for leaf in jax.tree.leaves(found))
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


def test_the_states_are_updated_in_place() -> None:
    ours, _ = scalers()
    tree = {"w": jnp.ones((64, 64 * 4))}
    state = jax.eval_shape(ours.init, tree)
    with jax.numpy_dtype_promotion("standard"):
        step = jax.jit(ours.update, donate_argnums=1).lower(tree, state)
    memory = step.compile().memory_analysis()
    states = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert memory.alias_size_in_bytes == states
    assert states < 2.04 * tree["w"].size
