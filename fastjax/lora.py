"""Adapters: which linears get one, how they start, how they merge."""

import dataclasses
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from fastjax.config import LoRAConfig, Table
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
from fastjax.nn.embedding import with_rows
from fastjax.nn.linear import AdapterSpec, Linear
from fastjax.target_modules import matched_modules
from kernels.nf4 import NF4Array, dequantize

ADAPTER_LEAVES = ("lora_a", "lora_b", "lora_magnitude", "rows")
_HF_PREFIX = "model."


def adapted_names(config: TransformerConfig, lora: LoRAConfig) -> tuple[str, ...]:
    """Returns the canonical names of the linears that `lora` targets.

    Raises:
      ConfigError: The targets match nothing; it lists what exists.
    """
    layers = set(lora.layers_to_transform)
    missing = sorted(layer for layer in layers if layer >= config.num_hidden_layers)
    if missing:
        raise ConfigError(
            f"layers_to_transform names {missing}; the model has the layers 0 to "
            f"{config.num_hidden_layers - 1}"
        )
    names = [_HF_PREFIX + name for name in linear_names(config)]
    matched = matched_modules(lora.lora_target_modules, names)
    kept = tuple(name.removeprefix(_HF_PREFIX) for name in matched)
    if layers:
        kept = tuple(name for name in kept if _layer_of(name) in layers)
    if not kept:
        raise ConfigError("layers_to_transform leaves no layer to adapt")
    return kept


def adapted_spec(spec: DecoderSpec, lora: LoRAConfig) -> DecoderSpec:
    """Returns `spec` with the adapters, trained biases and tables of `lora`.

    Raises:
      ConfigError: The model has no such modules.
    """
    names = adapted_names(spec.config, lora)
    adapters = {
        name: AdapterSpec(
            rank=lora.rank(_HF_PREFIX + name),
            scaling=lora.scaling(_HF_PREFIX + name),
            dropout=lora.lora_dropout,
            is_dora=lora.use_dora,
        )
        for name in names
    }
    biases = {
        "none": frozenset(),
        "lora_only": frozenset(names),
        "all": frozenset(linear_names(spec.config)),
    }
    return dataclasses.replace(
        spec,
        adapters=adapters,
        trained_biases=biases[lora.lora_bias],
        trained_tables=_trained_tables(spec.config, lora),
        trained_tokens=_trained_tokens(spec.config, lora),
    )


def plain_spec(spec: DecoderSpec) -> DecoderSpec:
    """Returns `spec` without adapters."""
    nothing = frozenset()
    return dataclasses.replace(
        spec,
        adapters={},
        trained_biases=nothing,
        trained_tables=nothing,
        trained_tokens=(),
    )


def with_adapters(
    decoder: Decoder,
    spec: DecoderSpec,
    adapted: DecoderSpec,
    key: PRNGKeyArray,
    *,
    is_gaussian: bool = False,
) -> Decoder:
    """Returns the decoder with fresh adapters over the same weights.

    `lora_a` is random and `lora_b` zero, so that training starts from the base model;
    a DoRA magnitude starts at the norm of its column.

    Args:
      decoder: A decoder of `spec`.
      spec: Its structure.
      adapted: The wanted structure, from `adapted_spec`.
      key: Of the random start.
      is_gaussian: `lora_a` is normal of deviation 1/R, else uniform in +-1/sqrt(I).
    """
    _require_frozen_base(spec)
    fresh = _rehoused(decoder, spec, adapted)
    for index, linear in enumerate(_linears(fresh, adapted)):
        _initialise(linear, jax.random.fold_in(key, index), is_gaussian=is_gaussian)
    table = fresh.embed_tokens
    if table.rows is not None:
        rows = table.weight.get_value()[jnp.asarray(table.tokens)]
        table.rows.set_value(rows.astype(jnp.float32))
    return fresh


def without_adapters(decoder: Decoder, spec: DecoderSpec) -> Decoder:
    """Returns the base model of an adapted decoder, which shares its arrays.

    Raises:
      ConfigError: Biases or tables of the base were trained.
    """
    _require_frozen_base(spec)
    return _rehoused(decoder, spec, plain_spec(spec))


def adapters_act(decoder: Decoder, spec: DecoderSpec) -> bool:
    """Whether any adapter changes the model's output: `lora_b` not zero, or DoRA."""
    if spec.trained_tables or spec.trained_tokens:
        return True
    for linear in _linears(decoder, spec):
        is_dora = linear.lora_magnitude is not None
        if is_dora or isinstance(linear.bias, nnx.Param):
            return True
        if linear.lora_b is not None and bool(jnp.any(linear.lora_b.get_value() != 0)):
            return True
    return False


def adapter_weights(decoder: Decoder, spec: DecoderSpec) -> dict[str, Array]:
    """Returns adapters, trained biases and tables by canonical name."""

    def wanted(name: str) -> bool:
        return _is_adapter(name) or _is_trained_beside(name, spec)

    return dict(flat_weights(decoder, spec, wanted=wanted))


def set_adapter_weights(decoder: Decoder, spec: DecoderSpec, weights: Adapters) -> None:
    """Puts what `adapter_weights` gives into the decoder.

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
        is_beside = path[-1] == "bias" or path[0] in new.trained_tables
        if is_beside and isinstance(variable, nnx.Param):
            variable.set_value(variable.get_value().astype(jnp.float32))
    return housed


def _trained_tables(config: TransformerConfig, lora: LoRAConfig) -> frozenset[Table]:
    tables = frozenset(lora.modules_to_save)
    if not config.tie_word_embeddings or not tables:
        return tables
    if lora.trainable_token_indices:
        raise ConfigError(
            "embedding and output head are one table in this model: modules_to_save "
            "trains all of it, trainable_token_indices some rows; give one of them"
        )
    # One table is both; PEFT wants it named by the embedding.
    return frozenset[Table](["embed_tokens"])


def _trained_tokens(config: TransformerConfig, lora: LoRAConfig) -> tuple[int, ...]:
    tokens = lora.trainable_token_indices
    unknown = [token for token in tokens if token >= config.vocab_size]
    if unknown:
        raise ConfigError(
            f"trainable_token_indices names {unknown}; the vocabulary has "
            f"{config.vocab_size} tokens"
        )
    return tokens


def _layer_of(name: str) -> int:
    return int(name.split(".")[1])


def _require_frozen_base(spec: DecoderSpec) -> None:
    if spec.trained_biases or spec.trained_tables:
        raise ConfigError(
            "biases or embeddings of the base model were trained with the adapters, so "
            "the base is not here any more",
            fix="load the base model again",
        )


def _linears(decoder: Decoder, spec: DecoderSpec) -> Iterator[Linear]:
    """Yields the linears of the layers, those of consecutive equal layers at once."""
    names = [name.split(".") for name in layer_linears(spec.config)]
    for segment in decoder.segments:
        for part, name in names:
            yield getattr(getattr(segment.block, part), name)


def _initialise(linear: Linear, key: PRNGKeyArray, *, is_gaussian: bool) -> None:
    if linear.lora_a is None or linear.lora_b is None:
        return
    shape = linear.lora_a.get_value().shape
    if is_gaussian:
        start = jax.random.normal(key, shape, jnp.float32) / shape[-1]
    else:
        bound = shape[-2] ** -0.5
        start = jax.random.uniform(key, shape, jnp.float32, -bound, bound)
    linear.lora_a.set_value(start)
    linear.lora_b.set_value(jnp.zeros(linear.lora_b.get_value().shape, jnp.float32))
    if linear.lora_magnitude is not None:
        weight = linear.weight.get_value()
        linear.lora_magnitude.set_value(jax.lax.map(_magnitude, weight))


def _magnitude(weight: Array | NF4Array) -> Float[Array, " O"]:
    dense = dequantize(weight) if isinstance(weight, NF4Array) else weight
    return column_norm(dense)


def _is_adapter(name: str) -> bool:
    return name.rpartition(".")[2] in ADAPTER_LEAVES


def _is_trained_beside(name: str, spec: DecoderSpec) -> bool:
    module, _, leaf = name.rpartition(".")
    is_bias = leaf == "bias" and module in spec.trained_biases
    return is_bias or module in spec.trained_tables
