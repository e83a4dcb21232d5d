"""Optimisers against their papers, written out in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastjax.config import Optimizer as OptimizerName
from fastjax.config import OptimizerConfig
from fastjax.train.optimizer import make_optimizer

STEPS = 3


def gradients(step: int) -> np.ndarray:
    return np.random.default_rng(step).normal(size=(5, 3))


def run(config: OptimizerConfig, start: np.ndarray, dtype=jnp.float32) -> np.ndarray:
    optimizer = make_optimizer(config, STEPS)
    tree = {"w": jnp.asarray(start, dtype)}
    state = optimizer.init(tree)
    update = jax.jit(optimizer.update)
    for step in range(STEPS):
        given = {"w": jnp.asarray(gradients(step), jnp.float32)}
        tree, state = update(given, state, tree, jnp.int32(step))
    return np.asarray(tree["w"]).astype(np.float64)


def torch_adamw(start: np.ndarray, rate: float, decay: float) -> np.ndarray:
    """The update of torch.optim.AdamW, betas (0.9, 0.999), eps 1e-8."""
    weight, m, v = start.copy(), np.zeros_like(start), np.zeros_like(start)
    for step in range(1, STEPS + 1):
        g = gradients(step - 1)
        weight *= 1 - rate * decay
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g * g
        root = np.sqrt(v) / np.sqrt(1 - 0.999**step) + 1e-8
        weight -= rate / (1 - 0.9**step) * m / root
    return weight


def constant(**changes: object) -> OptimizerConfig:
    fields = {"lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    return OptimizerConfig(**fields | changes)


def test_adamw_is_that_of_torch() -> None:
    start = np.random.default_rng(9).normal(size=(5, 3))
    actual = run(constant(learning_rate=1e-3, weight_decay=0.01), start)
    np.testing.assert_allclose(actual, torch_adamw(start, 1e-3, 0.01), atol=1e-6)


def test_lion_moves_by_signs() -> None:
    start = np.ones((5, 3))
    actual = run(constant(optim="lion", learning_rate=1e-3), start)
    weight, m = start.copy(), np.zeros_like(start)
    for step in range(STEPS):
        weight -= 1e-3 * np.sign(0.9 * m + 0.1 * gradients(step))
        m = 0.999 * m + 0.001 * gradients(step)
    np.testing.assert_allclose(actual, weight, atol=1e-6)


def test_sgd_clips_the_global_norm_and_decays() -> None:
    start = np.ones((5, 3))
    config = constant(
        optim="sgd", learning_rate=0.1, max_grad_norm=1.0, weight_decay=0.5
    )
    weight = start.copy()
    for step in range(STEPS):
        g = gradients(step)
        assert np.linalg.norm(g) > 1
        weight -= 0.1 * (g / np.linalg.norm(g) + 0.5 * weight)
    np.testing.assert_allclose(run(config, start), weight, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "adafactor", "lion", "sgd"])
def test_every_optimiser_keeps_the_dtype(name: OptimizerName) -> None:
    start = np.ones((5, 3))
    config = constant(optim=name, learning_rate=0.1)
    half = run(config, start, jnp.bfloat16)
    np.testing.assert_allclose(half, run(config, start), atol=0.02)
    assert np.abs(half - start).max() > 0.05


def test_tables_may_have_a_rate_of_their_own() -> None:
    config = constant(optim="sgd", learning_rate=0.1, embedding_learning_rate=0.02)
    optimizer = make_optimizer(config, 10)
    weights = {
        "embed_tokens": {"weight": jnp.ones(3)},
        "segments": {"weight": jnp.ones(3)},
    }
    state = optimizer.init(weights)
    moved, _ = optimizer.update(weights, state, weights, jnp.int32(0))
    np.testing.assert_allclose(moved["embed_tokens"]["weight"], 0.98, rtol=1e-6)
    np.testing.assert_allclose(moved["segments"]["weight"], 0.9, rtol=1e-6)
