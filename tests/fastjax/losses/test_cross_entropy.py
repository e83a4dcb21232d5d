"""The loss of fine-tuning, against log-softmax over all logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fastjax.losses import cross_entropy
from fastjax.losses.neftune import neftune_noise

VOCABULARY, WIDTH = 13, 8


class TwoTables(nnx.Module):
    """Looks tokens up in one table and scores them with another."""

    def __init__(self, dtype: str = "float32") -> None:
        self.compute_dtype = jnp.dtype(dtype)
        self.logit_softcap = None
        keys = jax.random.split(jax.random.key(0), 2)
        self.embed = nnx.Param(jax.random.normal(keys[0], (VOCABULARY, WIDTH)))
        self.head = nnx.Param(jax.random.normal(keys[1], (VOCABULARY, WIDTH)))

    def __call__(
        self,
        input_ids,
        *,
        positions,
        segment_ids,
        max_segments,
        dropout_key,
        embedding_noise,
        remat,
    ) -> jax.Array:
        assert (max_segments, remat) == (2, "layer")
        x = self.embed.get_value()[input_ids].astype(self.compute_dtype)
        x = x if embedding_noise is None else x + embedding_noise
        return x if dropout_key is None else 2 * x

    def head_weight(self) -> jax.Array:
        return self.head.get_value()

    def head_adapter(self, hidden: jax.Array, *, dropout_key: object) -> None:
        return None


def make_batch() -> dict[str, jax.Array]:
    random = np.random.default_rng(0)
    ids = random.integers(0, VOCABULARY, size=(2, 6)).astype(np.int32)
    targets = random.integers(0, VOCABULARY, size=(2, 6)).astype(np.int32)
    targets[0, 3:] = -100
    ones = np.ones_like(ids)
    batch = {"input_ids": ids, "targets": targets, "positions": 0 * ones}
    return {k: jnp.asarray(v) for k, v in (batch | {"segment_ids": ones}).items()}


def loss_and_gradient(dtype: str = "float32", **options: object) -> tuple:
    graphdef, trainable, frozen = nnx.split(TwoTables(dtype), nnx.Param, ...)

    def loss(weights: nnx.State) -> tuple[jax.Array, jax.Array]:
        return cross_entropy(
            graphdef,
            weights,
            frozen,
            make_batch(),
            max_segments=2,
            remat="layer",
            **options,
        )

    (total, count), gradient = jax.value_and_grad(loss, has_aux=True)(trainable)
    return total, count, jax.tree.map(np.asarray, nnx.to_pure_dict(gradient))


def expected(factor: float = 1.0) -> tuple:
    model, batch = TwoTables(), make_batch()
    targets = batch["targets"].reshape(-1)

    def loss(tables: dict[str, jax.Array]) -> jax.Array:
        hidden = factor * tables["embed"][batch["input_ids"].reshape(-1)]
        log_probs = jax.nn.log_softmax(hidden @ tables["head"].T)
        picked = log_probs[jnp.arange(12), jnp.maximum(targets, 0)]
        return -jnp.sum(jnp.where(targets == -100, 0.0, picked))

    tables = {"embed": model.embed.get_value(), "head": model.head.get_value()}
    return jax.value_and_grad(loss)(tables)


def test_sum_count_and_gradients_of_a_trained_head() -> None:
    total, count, gradient = loss_and_gradient(head_is_trainable=True)
    wanted, wanted_gradient = expected()
    assert float(count) == 9.0
    assert float(total) == pytest.approx(float(wanted), rel=1e-6)
    for name, value in wanted_gradient.items():
        np.testing.assert_allclose(gradient[name], value, atol=1e-5)


def test_the_gradient_of_a_float32_head_is_not_rounded() -> None:
    _, _, gradient = loss_and_gradient("bfloat16", head_is_trainable=True)
    head = gradient["head"]
    assert head.dtype == np.float32
    rounded = np.asarray(jnp.asarray(head).astype(jnp.bfloat16).astype(jnp.float32))
    assert np.mean(head != rounded) > 0.5


def test_a_frozen_head_gets_no_gradient() -> None:
    _, _, gradient = loss_and_gradient()
    np.testing.assert_allclose(gradient["embed"], expected()[1]["embed"], atol=1e-5)


def test_the_dropout_key_reaches_the_model() -> None:
    total, _, _ = loss_and_gradient(dropout_key=jax.random.key(0))
    assert float(total) == pytest.approx(float(expected(2.0)[0]), rel=1e-6)


def test_noise_on_embeddings_needs_a_key_and_keeps_gradients_of_the_table() -> None:
    plain = loss_and_gradient()
    assert float(loss_and_gradient(neftune_noise_alpha=5.0)[0]) == float(plain[0])
    key = jax.random.key(1)
    noisy = loss_and_gradient(dropout_key=key, neftune_noise_alpha=5.0)
    again = loss_and_gradient(dropout_key=key, neftune_noise_alpha=5.0)
    assert float(noisy[0]) == float(again[0])
    assert float(noisy[0]) != float(loss_and_gradient(dropout_key=key)[0])


def test_the_noise_of_a_document_is_sized_by_its_own_length() -> None:
    segment_ids = jnp.array([[1] * 4 + [2] * 12, [1] * 16])
    noise = neftune_noise(
        jax.random.key(0),
        segment_ids,
        features=64,
        alpha=5.0,
        max_segments=2,
        dtype=jnp.dtype("float32"),
    )
    for row, place, tokens in ((0, slice(4), 4), (0, slice(4, 16), 12), (1, ..., 16)):
        largest = float(jnp.abs(noise[row][place]).max())
        bound = 5.0 / np.sqrt(tokens * 64)
        assert 0.95 * bound < largest <= bound
