"""Adapters: which linears get one, how they start, how they merge."""

import dataclasses
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from fastjax.config import LoRAConfig
from fastjax.errors import ConfigError
from fastjax.models.build import (
    Adapters,
    DecoderSpec,
    Weights,
    abstract_decoder,
    flat_weights,
    layer_linears,
    linear_names,
    place_weights,
)
from fastjax.models.transformer_config import TransformerConfig
from fastjax.nn.decoder import Decoder
from fastjax.nn.linear import AdapterSpec, Linear
from fastjax.target_modules import matched_modules
from kernels.nf4 import NF4Array, dequantize

ADAPTER_LEAVES = ("lora_a", "lora_b", "lora_magnitude")
_HF_PREFIX = "model."


def adapted_names(config: TransformerConfig, lora: LoRAConfig) -> tuple[str, ...]:
    """Returns the canonical names of the linears that `lora` targets.

    Raises:
      ConfigError: The targets match nothing; it lists what exists.
    """
    names = [_HF_PREFIX + name for name in linear_names(config)]
    matched = matched_modules(lora.lora_target_modules, names)
    return tuple(name.removeprefix(_HF_PREFIX) for name in matched)


def adapted_spec(spec: DecoderSpec, lora: LoRAConfig) -> DecoderSpec:
    """Returns `spec` with the adapters and trained biases of `lora`."""
    adapter = AdapterSpec(
        rank=lora.lora_r,
        scaling=lora.scaling,
        dropout=lora.lora_dropout,
        is_dora=lora.use_dora,
    )
    names = adapted_names(spec.config, lora)
    biases = {
        "none": frozenset(),
        "lora_only": frozenset(names),
        "all": frozenset(linear_names(spec.config)),
    }
    return dataclasses.replace(
        spec,
        adapters=dict.fromkeys(names, adapter),
        trained_biases=biases[lora.lora_bias],
    )


def plain_spec(spec: DecoderSpec) -> DecoderSpec:
    """Returns `spec` without adapters."""
    return dataclasses.replace(spec, adapters={}, trained_biases=frozenset())


def with_adapters(
    decoder: Decoder, spec: DecoderSpec, adapted: DecoderSpec, key: PRNGKeyArray
) -> Decoder:
    """Returns the decoder with fresh adapters over the same weights.

    `lora_a` is uniform in +-1/sqrt(I) and `lora_b` zero, so that training starts from
    the base model; a DoRA magnitude starts at the norm of its column.

    Args:
      decoder: A decoder of `spec`.
      spec: Its structure.
      adapted: The wanted structure, from `adapted_spec`.
      key: Of the random start.
    """
    _require_frozen_biases(spec)
    fresh = _rehoused(decoder, spec, adapted)
    for index, linear in enumerate(_linears(fresh, adapted)):
        _initialise(linear, jax.random.fold_in(key, index))
    return fresh


def without_adapters(decoder: Decoder, spec: DecoderSpec) -> Decoder:
    """Returns the base model of an adapted decoder, which shares its arrays.

    Raises:
      ConfigError: Biases of the base were trained.
    """
    _require_frozen_biases(spec)
    return _rehoused(decoder, spec, plain_spec(spec))


def adapters_act(decoder: Decoder, spec: DecoderSpec) -> bool:
    """Whether any adapter changes the model's output: `lora_b` not zero, or DoRA."""
    for linear in _linears(decoder, spec):
        is_dora = linear.lora_magnitude is not None
        if is_dora or isinstance(linear.bias, nnx.Param):
            return True
        if linear.lora_b is not None and bool(jnp.any(linear.lora_b.get_value() != 0)):
            return True
    return False


def adapter_weights(decoder: Decoder, spec: DecoderSpec) -> dict[str, Array]:
    """Returns adapters and trained biases by canonical name."""

    def wanted(name: str) -> bool:
        return _is_adapter(name) or _is_trained_bias(name, spec)

    return dict(flat_weights(decoder, spec, wanted=wanted))


def set_adapter_weights(decoder: Decoder, spec: DecoderSpec, weights: Adapters) -> None:
    """Puts adapters and trained biases, by canonical name, into the decoder.

    Raises:
      ValueError: Some have no place.
    """
    left: Weights = dict(weights)
    place_weights(decoder, spec, left)
    if left:
        raise ValueError(f"adapter weights without a place: {sorted(left)[:10]}")


def merged_weights(
    base: Iterable[tuple[str, Array | NF4Array]], adapters: Adapters, spec: DecoderSpec
) -> Iterator[tuple[str, Array | NF4Array]]:
    """Yields (canonical name, array) of the model with its adapters merged.

    What adapters change is float32, for the writer to round once; all else comes as it
    is.

    Args:
      base: Every weight of the base model.
      adapters: From `adapter_weights`.
      spec: Structure of the adapted decoder.
    """
    for name, value in base:
        if _is_adapter(name):
            continue
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and module in spec.adapters:
            weight = dequantize(value) if isinstance(value, NF4Array) else value
            yield name, _merged(weight, module, adapters, spec.adapters[module])
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
    merged = weight.astype(jnp.float32) + adapter.scaling * product
    if adapter.is_dora:
        factor = adapters[f"{module}.lora_magnitude"] / column_norm(merged)
        merged = merged * factor[None, :]
    return merged


def _rehoused(decoder: Decoder, old: DecoderSpec, new: DecoderSpec) -> Decoder:
    """Returns a decoder of `new` with the weights of `old`; new adapters are abstract.

    Where the layers are stacked alike the arrays are shared, else they are restacked.
    """
    housed = abstract_decoder(new)
    if old.segments() == new.segments():
        held = dict(nnx.to_flat_state(nnx.state(decoder)))
        for path, variable in nnx.to_flat_state(nnx.state(housed)):
            if path in held and path[-1] not in (*ADAPTER_LEAVES, "lora_scaling"):
                variable.set_value(held[path].get_value())
    else:
        base = flat_weights(decoder, old, wanted=lambda n: not _is_adapter(n))
        place_weights(housed, new, dict(base))
    for path, variable in nnx.to_flat_state(nnx.state(housed)):
        if path[-1] == "bias" and isinstance(variable, nnx.Param):
            variable.set_value(variable.get_value().astype(jnp.float32))
    return housed


def _require_frozen_biases(spec: DecoderSpec) -> None:
    if spec.trained_biases:
        raise ConfigError(
            "the biases of the base model were trained with the adapters, so the base "
            "is not here any more",
            fix="load the base model again",
        )


def _linears(decoder: Decoder, spec: DecoderSpec) -> Iterator[Linear]:
    """Yields the linears of the layers, those of consecutive equal layers at once."""
    names = [name.split(".") for name in layer_linears(spec.config)]
    for segment in decoder.segments:
        for part, name in names:
            yield getattr(getattr(segment.block, part), name)


def _initialise(linear: Linear, key: PRNGKeyArray) -> None:
    if linear.lora_a is None or linear.lora_b is None:
        return
    shape = linear.lora_a.get_value().shape
    bound = shape[-2] ** -0.5
    linear.lora_a.set_value(jax.random.uniform(key, shape, jnp.float32, -bound, bound))
    linear.lora_b.set_value(jnp.zeros(linear.lora_b.get_value().shape, jnp.float32))
    if linear.lora_magnitude is not None:
        weight = linear.weight.get_value()
        linear.lora_magnitude.set_value(jax.lax.map(_magnitude, weight))


def _magnitude(weight: Array | NF4Array) -> Float[Array, " O"]:
    dense = dequantize(weight) if isinstance(weight, NF4Array) else weight
    return column_norm(dense)


def _is_adapter(name: str) -> bool:
    return name.endswith(ADAPTER_LEAVES)


def _is_trained_bias(name: str, spec: DecoderSpec) -> bool:
    module, _, leaf = name.rpartition(".")
    return leaf == "bias" and module in spec.trained_biases
