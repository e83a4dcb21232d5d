"""The step: accumulation, skipped updates, float16 scaling, dropout keys."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fastjax.config import OptimizerConfig
from fastjax.train import compiled
from fastjax.train.optimizer import make_optimizer
from fastjax.train.state import FIRST_SCALE, LossScale, init_state
from fastjax.train.step import make_train_step, summed_gradients

CONFIG = OptimizerConfig(learning_rate=1e-2, lr_scheduler_type="constant")


def make_loss(graphdef, poison: float = 0.0):
    """Cross-entropy in plain jnp, so that these tests need no kernel."""

    def loss(trainable, frozen, batch, *, dropout_key):
        model = nnx.merge(graphdef, trainable, frozen)
        hidden = model(
            batch["input_ids"], positions=batch["positions"], dropout_key=dropout_key
        )
        logits = (hidden @ model.head_weight().T).astype(jnp.float32)
        targets = batch["targets"]
        kept = targets != -100
        picked = jnp.take_along_axis(
            jax.nn.log_softmax(logits), jnp.where(kept, targets, 0)[..., None], axis=-1
        )[..., 0]
        total = -jnp.sum(jnp.where(kept, picked, 0.0))
        return total + poison, jnp.sum(kept.astype(jnp.float32))

    return loss


def batch_of(tiny: SimpleNamespace, micro_batches: int, seed: int = 3) -> dict:
    rows = tiny.rows(seed, 8)
    return {
        k: jnp.asarray(v.reshape(micro_batches, 8 // micro_batches, -1))
        for k, v in rows.items()
    }


def make(tiny: SimpleNamespace, dtype: str = "float32", **options):
    graphdef, trainable, frozen = tiny.split()
    optimizer = make_optimizer(CONFIG, 10)
    step = make_train_step(
        make_loss(graphdef, options.pop("poison", 0.0)),
        optimizer,
        seed=1,
        dtype=dtype,
        **options,
    )
    return step, init_state(trainable, optimizer, dtype), frozen


def flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize("micro_batches", [2, 8])
def test_every_split_gives_the_same_gradient(tiny, micro_batches: int) -> None:
    graphdef, trainable, frozen = tiny.split()
    one = jnp.float32(1.0)

    def gradient(count: int):
        batch = batch_of(tiny, count)
        return summed_gradients(
            make_loss(graphdef), trainable, frozen, batch, factor=one
        )

    expected, loss, tokens = gradient(1)
    actual, other_loss, other_tokens = gradient(micro_batches)
    lengths = np.sum(np.asarray(batch_of(tiny, 8)["targets"]) != -100, axis=(1, 2))
    assert len(set(lengths.tolist())) > 2
    assert int(tokens) == int(other_tokens) == lengths.sum()
    difference = (
        np.abs(flat(actual) - flat(expected)).max() / np.abs(flat(expected)).max()
    )
    assert difference < 1e-6
    assert float(loss) == pytest.approx(float(other_loss), rel=1e-6)


@pytest.mark.parametrize("micro_batches", [2, 8])
def test_every_split_makes_the_same_step(tiny, micro_batches: int) -> None:
    results = []
    for count in (1, micro_batches):
        step, state, frozen = make(tiny)
        state, metrics = step(state, frozen, batch_of(tiny, count))
        results.append((float(metrics["loss"]), flat(state.trainable)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    np.testing.assert_allclose(results[0][1], results[1][1], atol=2e-6)


def test_metrics_and_loss_fall(tiny) -> None:
    step, state, frozen = make(tiny)
    losses = []
    for _ in range(10):
        state, metrics = step(state, frozen, batch_of(tiny, 2))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    assert int(state.step) == 10
    assert set(metrics) == {
        "loss",
        "grad_norm",
        "learning_rate",
        "num_tokens",
        "skipped",
        "loss_scale",
    }
    assert float(metrics["learning_rate"]) == pytest.approx(1e-2)
    assert float(metrics["skipped"]) == 0.0
    assert float(metrics["loss_scale"]) == 1.0


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_an_update_that_is_not_finite_is_left_out(tiny, poison: float) -> None:
    step, state, frozen = make(tiny, poison=poison)
    before = (flat(state.trainable), flat(state.opt_state))
    state, metrics = step(state, frozen, batch_of(tiny, 2))
    assert float(metrics["skipped"]) == 1.0
    assert not np.isfinite(float(metrics["loss"]))
    assert int(state.step) == 1
    np.testing.assert_array_equal(flat(state.trainable), before[0])
    np.testing.assert_array_equal(flat(state.opt_state), before[1])


def test_no_token_divides_by_one(tiny) -> None:
    step, state, frozen = make(tiny)
    batch = batch_of(tiny, 2)
    batch["targets"] = jnp.full_like(batch["targets"], -100)
    state, metrics = step(state, frozen, batch)
    assert float(metrics["num_tokens"]) == 0.0
    assert float(metrics["loss"]) == 0.0
    assert np.isfinite(flat(state.trainable)).all()


def test_dropout_is_a_function_of_seed_and_step(tiny) -> None:
    losses = []
    for _ in range(2):
        step, state, frozen = make(tiny, has_dropout=True)
        run = []
        for _ in range(2):
            state, metrics = step(state, frozen, batch_of(tiny, 2))
            run.append(float(metrics["loss"]))
        losses.append(run)
    assert losses[0] == losses[1]
    plain, state, frozen = make(tiny)
    assert losses[0][0] != float(plain(state, frozen, batch_of(tiny, 2))[1]["loss"])


def test_float16_scales_the_loss_and_not_the_gradient(tiny) -> None:
    step, state, frozen = make(tiny)
    _, plain = step(state, frozen, batch_of(tiny, 2))
    step, state, frozen = make(tiny, "float16")
    state, scaled = step(state, frozen, batch_of(tiny, 2))
    assert float(scaled["loss_scale"]) == FIRST_SCALE
    assert float(scaled["grad_norm"]) == pytest.approx(
        float(plain["grad_norm"]), rel=1e-5
    )


def test_loss_scale_halves_on_overflow_and_doubles_after_good_steps() -> None:
    scale = LossScale.start("float16").after(jnp.array(False))
    assert float(scale.scale) == FIRST_SCALE / 2
    scale = LossScale(scale=jnp.float32(8.0), good_steps=jnp.int32(1998))
    scale = scale.after(jnp.array(True))
    assert (float(scale.scale), int(scale.good_steps)) == (8.0, 1999)
    scale = scale.after(jnp.array(True))
    assert (float(scale.scale), int(scale.good_steps)) == (16.0, 0)
    scale = LossScale(scale=jnp.float32(1.0), good_steps=jnp.int32(5))
    assert float(scale.after(jnp.array(False)).scale) == 1.0


def test_programs_of_the_cache_are_counted_while_one_compiles() -> None:
    event = "/jax/compilation_cache/cache_hits"
    with compiled.cache_hits() as hits:
        assert not hits
        jax.monitoring.record_event("/jax/other")
        jax.monitoring.record_event(event)
    jax.monitoring.record_event(event)
    assert hits == [event]


def test_state_is_donated(tiny) -> None:
    step, state, frozen = make(tiny)
    step(state, frozen, batch_of(tiny, 1))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.trainable))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(frozen))
