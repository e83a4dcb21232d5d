"""Adapters merged into the weights under them."""

from collections.abc import Iterable, Iterator
from typing import get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fastjax.config import Table
from fastjax.errors import ConfigError
from fastjax.models.build import (
    Adapters,
    DecoderSpec,
    abstract_decoder,
    weight_places,
)
from fastjax.nn.embedding import with_rows
from fastjax.nn.linear import AdapterSpec
from kernels.packed import PackedArray, dense

TABLES = get_args(Table)
ADAPTER_LEAVES = ("lora_a", "lora_b", "lora_b_bias", "lora_magnitude", "rows")


def merged_weights(
    base: Iterable[tuple[str, Array | PackedArray]],
    adapters: Adapters,
    spec: DecoderSpec,
) -> Iterator[tuple[str, Array | PackedArray]]:
    """Yields (canonical name, array) of the model with its adapters merged.

    What adapters change is float32, for the writer to round once; all else comes as it
    is.

    Args:
      base: Every weight of the base model.
      adapters: From `adapter_weights`.
      spec: Structure of the adapted decoder.

    Raises:
      ConfigError: A bias of an up projection has no bias to be added to.
    """
    _require_biases(spec)
    for name, value in base:
        if is_of_adapter(name):
            continue
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and module in spec.adapters:
            weight = dense(adapters.get(name, value))
            yield name, _merged(weight, module, adapters, spec.adapters[module])
        elif leaf == "bias" and f"{module}.lora_b_bias" in adapters:
            added = spec.adapters[module].scaling * adapters[f"{module}.lora_b_bias"]
            yield name, jnp.asarray(adapters.get(name, value), jnp.float32) + added
        elif f"{module}.rows" in adapters:
            rows = adapters[f"{module}.rows"]
            table = jnp.asarray(value).astype(jnp.float32)
            yield name, with_rows(table, spec.trained_tokens, rows)
        else:
            yield name, adapters.get(name, value)


def column_norm(weight: Float[Array, "I O"]) -> Float[Array, " O"]:
    """Returns the Euclidean norm of each output feature's weights, in float32."""
    return jnp.sqrt(jnp.sum(jnp.square(weight.astype(jnp.float32)), axis=0))


def _merged(
    weight: Float[Array, "I O"], module: str, adapters: Adapters, adapter: AdapterSpec
) -> Float[Array, "I O"]:
    """Returns the float32 weight that does what the base and its adapter do."""
    a, b = adapters[f"{module}.lora_a"], adapters[f"{module}.lora_b"]
    product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    if module == "lm_head":
        product = product.T  # Of hidden states, to rows of tokens.
    merged = weight.astype(jnp.float32) + adapter.scaling * product
    if adapter.is_dora:
        factor = adapters[f"{module}.lora_magnitude"] / column_norm(merged)
        merged = merged * factor[None, :]
    return merged


def _require_biases(spec: DecoderSpec) -> None:
    wanted = {
        f"{name}.bias" for name, adapter in spec.adapters.items() if adapter.has_bias
    }
    places = weight_places(abstract_decoder(spec), spec) if wanted else ()
    missing = sorted(wanted.difference(*(names for names, _ in places)))
    if missing:
        raise ConfigError(
            f"lora_b_bias cannot be merged: the base has no {missing[0]} and "
            f"{len(missing) - 1} more",
            fix="use the adapter beside its base",
        )


def is_of_adapter(name: str) -> bool:
    """Whether a weight is an adapter's, by its name."""
    return name.rpartition(".")[2] in ADAPTER_LEAVES
