"""Adapters of the output table, apart from its rounded rows."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fastjax.api import FastLanguageModel, load_model
from fastjax.losses import cross_entropy
from kernels.numerics import relative_error

IDS = np.arange(6, 30, dtype=np.int32)[None]
SCALING = 2.0


@pytest.fixture(params=["lm_head", "embed_tokens"])
def adapted(request: Any, small_model: Path, fixtures: Path) -> Any:
    """A model in bfloat16 whose head, of its own or tied, has a small adapter."""
    name, rank = request.param, 8
    folder = small_model if name == "lm_head" else fixtures / "tiny_llama_tied"
    model = FastLanguageModel.get_peft_model(
        load_model(str(folder)), r=rank, lora_alpha=16, target_modules=[name]
    )
    table = getattr(model.decoder, name)
    small = table.lora_b if name == "lm_head" else table.lora_a
    shape = small.get_value().shape
    small.set_value(1e-4 * jax.random.normal(jax.random.key(7), shape))
    return model


def _parts(model: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns table, and adapter as (D, R) and (R, V), in float32."""
    head = model.decoder.lm_head or model.decoder.embed_tokens
    table = head.weight.get_value()
    assert table.dtype == jnp.bfloat16
    a, b = head.lora_a.get_value(), head.lora_b.get_value()
    down, up = (a, b) if head.is_head else (b.T, a.T)
    return table.astype(jnp.float32), down, up


def _hidden(model: Any) -> jax.Array:
    positions = jnp.arange(IDS.shape[1], dtype=jnp.int32)[None]
    return model.decoder(jnp.asarray(IDS), positions=positions)


def _batch() -> dict[str, jax.Array]:
    targets = jnp.asarray(np.roll(IDS, -1))
    return {
        "input_ids": jnp.asarray(IDS),
        "targets": targets,
        "positions": jnp.arange(IDS.shape[1], dtype=jnp.int32)[None],
        "segment_ids": jnp.ones_like(targets),
    }


def _exact(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def test_small_changes_reach_the_logits(adapted: Any) -> None:
    hidden = _hidden(adapted)
    exact = hidden[0].astype(jnp.float32)
    table, down, up = _parts(adapted)
    change = adapted.decoder.logits(hidden)[0] - _exact(exact, table.T)
    assert relative_error(change, SCALING * _exact(_exact(exact, down), up)) < 0.01


def test_loss_and_gradients_are_those_of_float32(adapted: Any) -> None:
    hidden = _hidden(adapted)[0].astype(jnp.float32)
    batch = _batch()
    targets = batch["targets"]
    table, down, up = _parts(adapted)

    def reference(down: jax.Array, up: jax.Array) -> jax.Array:
        logits = _exact(hidden, table.T) + SCALING * _exact(_exact(hidden, down), up)
        own = jnp.take_along_axis(jax.nn.log_softmax(logits), targets.T, axis=1)
        return -jnp.sum(own)

    expected, wanted = jax.value_and_grad(reference, (0, 1))(down, up)
    graphdef, trainable, frozen = adapted.split()

    def loss(trainable: nnx.State) -> jax.Array:
        return cross_entropy(graphdef, trainable, frozen, batch, max_segments=1)[0]

    assert not adapted.spec.trains_head
    actual, gradients = jax.jit(jax.value_and_grad(loss))(trainable)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    if adapted.decoder.lm_head is None:
        return  # The lookup adds to the gradients; what PEFT computes has tests.
    head = gradients["lm_head"]
    for name, value in zip(("lora_a", "lora_b"), wanted, strict=True):
        gradient = head[name].get_value()
        assert gradient.dtype == jnp.float32
        assert relative_error(gradient, value) < 0.01, name


def test_dropout_acts_on_the_branch_alone(small_model: Path) -> None:
    model = FastLanguageModel.get_peft_model(
        load_model(str(small_model), dtype="float32"),
        r=4,
        lora_alpha=8,
        lora_dropout=0.5,
        target_modules=["lm_head"],
    )
    hidden = _hidden(model)[0]
    down_of = functools.partial(model.decoder.head_adapter, hidden)
    plain, dropped = down_of(), down_of(dropout_key=jax.random.key(3))
    assert plain is not None
    assert dropped is not None
    assert relative_error(dropped.down, plain.down) > 0.1
    keys = jax.random.split(jax.random.key(4), 400)
    downs = [down_of(dropout_key=key) for key in keys]
    mean = sum(d.down for d in downs if d is not None) / len(keys)
    assert relative_error(mean, plain.down) < 0.1


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_the_loss_draws_the_heads_dropout_by_its_key(
    rate: float, small_model: Path
) -> None:
    model = FastLanguageModel.get_peft_model(
        load_model(str(small_model), dtype="float32"),
        r=4,
        lora_alpha=8,
        lora_dropout=rate,
        target_modules=["lm_head"],
    )
    head = model.decoder.lm_head
    shape = head.lora_b.get_value().shape
    head.lora_b.set_value(jax.random.normal(jax.random.key(7), shape))
    keys = (None, jax.random.key(0), jax.random.key(1))
    losses = {
        float(cross_entropy(*model.split(), _batch(), dropout_key=key)[0])
        for key in keys
    }
    assert len(losses) == (len(keys) if rate else 1)
