"""The feed-forward half whose inside the backward pass makes again, in chunks."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from fastjax import lora as adapters
from fastjax.config import LoRAConfig
from fastjax.models.build import DecoderSpec, abstract_decoder
from fastjax.models.registry import preset
from fastjax.nn import feed_forward
from fastjax.nn.feed_forward import (
    FeedForward,
    chunk_tokens,
    hand_back,
    handed_feed_forward,
    remade_feed_forward,
)
from kernels.numerics import relative_error


def _half(*, has_last_norm: bool) -> tuple[FeedForward, int]:
    """Returns random modules with adapters, without the axis of layers, and D."""
    config = preset("tiny").config
    spec = adapters.adapted_spec(DecoderSpec(config=config), LoRAConfig(lora_r=4))
    block = abstract_decoder(spec).segments[0].block
    for index, (_, variable) in enumerate(nnx.to_flat_state(nnx.state(block))):
        like = variable.get_value()
        value = jax.random.normal(jax.random.key(index), like.shape[1:]) / 8
        variable.set_value(value.astype(like.dtype))
    norm = block.post_attention_layernorm
    last = norm if has_last_norm else None
    return FeedForward(norm, block.mlp, last, 0.5), config.hidden_size


@pytest.mark.parametrize("has_last_norm", [False, True])
def test_chunks_change_neither_result_nor_gradients(
    has_last_norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_forward, "CHUNK_TOKENS", 64)
    half, features = _half(has_last_norm=has_last_norm)
    x = jax.random.normal(jax.random.key(1), (2, 89, features))
    graphdef, trained, frozen = nnx.split(tuple(half[:3]), nnx.Param, ...)

    def loss(make: Any, trained: Any, x: jax.Array) -> jax.Array:
        modules = nnx.merge(graphdef, trained, frozen)
        return jnp.sum(jnp.sin(make(FeedForward(*modules, half.scale), x, None)))

    def results(make: Any) -> Any:
        return jax.jit(jax.value_and_grad(lambda t, x: loss(make, t, x), (0, 1)))(
            trained, x
        )

    def handed(half: FeedForward, x: jax.Array, key: None) -> jax.Array:
        return hand_back(*handed_feed_forward(half, x, key))

    expected = jax.tree.leaves(results(FeedForward.__call__))
    for make in (remade_feed_forward, handed):
        actual = jax.tree.leaves(results(make))
        for one, other in zip(actual, expected, strict=True):
            assert relative_error(one, other) < 1e-5


def test_chunks_are_equal_and_of_whole_tiles() -> None:
    most = feed_forward.CHUNK_TOKENS
    counts = [5, most, most + 1, 4 * most, 342_016]
    assert [chunk_tokens(count) for count in counts] == [
        5,
        most,
        most // 2 + 64,
        most,
        8_192,
    ]
