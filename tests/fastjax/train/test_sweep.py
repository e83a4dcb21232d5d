"""One step of several adapters does what the steps of each alone do."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fastjax.config import OptimizerConfig
from fastjax.losses import cross_entropy
from fastjax.train import init_state, make_optimizer, make_train_step
from fastjax.train.sweep import (
    Variant,
    evaluate_sweep,
    item_of,
    make_sweep_eval_step,
    make_sweep_step,
    stacked,
)

STEPS = 3
VARIANTS = ((1e-2, 0), (3e-2, 5))


def test_adapters_that_train_together_are_those_that_train_alone(
    tiny: SimpleNamespace,
) -> None:
    graphdef, _, frozen = tiny.split()
    loss = functools.partial(cross_entropy, graphdef)
    starts = [tiny.split(seed)[1] for _, seed in VARIANTS]
    unit = make_optimizer(OptimizerConfig(learning_rate=1.0), STEPS)
    variants = [
        Variant(
            learning_rate=jnp.float32(rate),
            table_factor=jnp.float32(1.0),
            seed=jnp.uint32(seed),
            own=nnx.State({}),
        )
        for rate, seed in VARIANTS
    ]
    base = stacked(variants), frozen
    states = stacked([init_state(start, unit, "float32") for start in starts])
    step = make_sweep_step(loss, unit, has_dropout=True, dtype="float32")
    loader = tiny.TinyLoader()
    together = []
    for index in range(STEPS):
        states, metrics = step(states, base, loader.batch(index))
        together.append(jax.device_get(metrics))
    for place, ((rate, seed), start) in enumerate(zip(VARIANTS, starts, strict=True)):
        optimizer = make_optimizer(OptimizerConfig(learning_rate=rate), STEPS)
        alone = make_train_step(loss, optimizer, seed=seed, has_dropout=True)
        state = init_state(start, optimizer, "float32")
        for index in range(STEPS):
            state, metrics = alone(state, frozen, loader.batch(index))
            for name, value in metrics.items():
                assert together[index][name][place] == pytest.approx(
                    float(value), rel=1e-5
                )
        weights = item_of(states.trainable, place)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, atol=1e-6),
            weights,
            state.trainable,
        )
    results = evaluate_sweep(make_sweep_eval_step(loss), states.trainable, base, loader)
    assert results[0].loss != results[1].loss
