"""Adapters: which modules get one, and how they start."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from fastjax.config import LoRAConfig, Table
from fastjax.errors import ConfigError
from fastjax.merge import ADAPTER_LEAVES, TABLES, column_norm, is_of_adapter
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
from fastjax.nn.embedding import Embedding
from fastjax.nn.linear import AdapterSpec, Linear
from fastjax.target_modules import (
    adaptable_modules,
    full_name,
    matched_modules,
    own_name,
)
from kernels.packed import PackedArray, dense


def adapted_names(config: TransformerConfig, lora: LoRAConfig) -> tuple[str, ...]:
    """Returns the canonical names of the linears and tables that `lora` targets.

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
    names = adaptable_modules(
        lora.lora_target_modules,
        [full_name(name) for name in linear_names(config)],
        is_tied=config.tie_word_embeddings,
    )
    matched = matched_modules(lora.lora_target_modules, names)
    kept = tuple(map(own_name, matched))
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
            rank=lora.rank(full_name(name)),
            scaling=lora.scaling(full_name(name)),
            dropout=lora.lora_dropout,
            is_dora=lora.use_dora,
            has_bias=lora.lora_b_bias,
        )
        for name in names
    }
    _require_plain_tables(set(adapters) & set(TABLES), lora)
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
    for index, module in enumerate(_modules(fresh, adapted)):
        own_key = jax.random.fold_in(key, index)
        _initialise(module, own_key, is_gaussian=is_gaussian)
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
    """Whether any adapter changes the model's output: no factor zero, or DoRA."""
    if spec.trained_tables or spec.trained_tokens or spec.trained_biases:
        return True
    if any(adapter.is_dora for adapter in spec.adapters.values()):
        return True
    for module in _modules(decoder, spec):
        # The factor that starts at zero differs between linears and embeddings.
        factors = (module.lora_a, module.lora_b)
        if all(held is not None and _any(held) for held in factors):
            return True
        bias = module.lora_b_bias if isinstance(module, Linear) else None
        if bias is not None and _any(bias):
            return True
    return False


def adapter_weights(decoder: Decoder, spec: DecoderSpec) -> dict[str, Array]:
    """Returns adapters, trained biases and tables by canonical name.

    Adapted tables come with their weights, as PEFT keeps them.
    """

    def wanted(name: str) -> bool:
        return is_of_adapter(name) or _is_trained_beside(name, spec)

    return dict(flat_weights(decoder, spec, wanted=wanted))


def set_adapter_weights(decoder: Decoder, spec: DecoderSpec, weights: Adapters) -> None:
    """Puts what `adapter_weights` gives into the decoder.

    Raises:
      ValueError: Some have no place.
    """
    dtype = jnp.dtype(spec.param_dtype)
    left: Weights = {
        name: array.astype(dtype) if _is_under_adapter(name, spec) else array
        for name, array in weights.items()
    }
    place_weights(decoder, spec, left)
    if left:
        raise ValueError(f"adapter weights without a place: {sorted(left)[:10]}")


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
        base = flat_weights(decoder, old, wanted=lambda n: not is_of_adapter(n))
        place_weights(housed, new, dict(base))
    for path, variable in nnx.to_flat_state(nnx.state(housed)):
        is_beside = path[-1] == "bias" or path[0] in new.trained_tables
        if is_beside and isinstance(variable, nnx.Param):
            variable.set_value(variable.get_value().astype(jnp.float32))
    return housed


def _require_plain_tables(tables: set[str], lora: LoRAConfig) -> None:
    """Checks that adapters of embeddings and head are such as PEFT has."""
    if not tables:
        return
    twice = tables & set(lora.modules_to_save)
    if "embed_tokens" in tables and lora.trainable_token_indices:
        twice.add("embed_tokens")
    if twice:
        raise ConfigError(
            f"{', '.join(sorted(twice))} would train twice: by an adapter and by "
            "modules_to_save or trainable_token_indices; choose one"
        )
    wrong = {"use_dora": lora.use_dora, "lora_b_bias": lora.lora_b_bias}
    for name in (name for name, is_on in wrong.items() if is_on):
        raise ConfigError(
            f"{name} is for linear layers, but target_modules names "
            f"{' and '.join(sorted(tables))}",
            fix=f"leave out {name}, or name these in modules_to_save",
        )


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


def _layer_of(name: str) -> int | None:
    return None if name in TABLES else int(name.split(".")[1])


def _require_frozen_base(spec: DecoderSpec) -> None:
    if spec.trained_biases or spec.trained_tables:
        raise ConfigError(
            "biases or embeddings of the base model were trained with the adapters, so "
            "the base is not here any more",
            fix="load the base model again",
        )


def _modules(decoder: Decoder, spec: DecoderSpec) -> Iterator[Linear | Embedding]:
    """Yields what may have adapters; linears of consecutive equal layers at once."""
    names = [name.split(".") for name in layer_linears(spec.config)]
    for segment in decoder.segments:
        for part, name in names:
            yield getattr(getattr(segment.block, part), name)
    yield decoder.embed_tokens
    if decoder.lm_head is not None:
        yield decoder.lm_head


def _initialise(
    module: Linear | Embedding, key: PRNGKeyArray, *, is_gaussian: bool
) -> None:
    if module.lora_a is None or module.lora_b is None:
        return
    shape, up_shape = (x.get_value().shape for x in (module.lora_a, module.lora_b))
    if isinstance(module, Embedding) and not module.is_head:
        # As PEFT: few tokens are seen, so it is the down projection that starts at 0.
        module.lora_a.set_value(jnp.zeros(shape, jnp.float32))
        module.lora_b.set_value(jax.random.normal(key, up_shape, jnp.float32))
        return
    if is_gaussian:
        start = jax.random.normal(key, shape, jnp.float32) / shape[-1]
    else:
        bound = shape[-2] ** -0.5
        start = jax.random.uniform(key, shape, jnp.float32, -bound, bound)
    module.lora_a.set_value(start)
    module.lora_b.set_value(jnp.zeros(up_shape, jnp.float32))
    if isinstance(module, Embedding):
        return
    if module.lora_b_bias is not None:
        bias = module.lora_b_bias
        bias.set_value(jnp.zeros(bias.get_value().shape, jnp.float32))
    if module.lora_magnitude is not None:
        weight = module.weight.get_value()
        module.lora_magnitude.set_value(jax.lax.map(_magnitude, weight))


def _magnitude(weight: Array | PackedArray) -> Float[Array, " O"]:
    return column_norm(dense(weight))


def _is_trained_beside(name: str, spec: DecoderSpec) -> bool:
    module, _, leaf = name.rpartition(".")
    is_bias = leaf == "bias" and module in spec.trained_biases
    return is_bias or module in spec.trained_tables or _is_under_adapter(name, spec)


def _is_under_adapter(name: str, spec: DecoderSpec) -> bool:
    """Whether a weight is a table with an adapter on it."""
    module, _, leaf = name.rpartition(".")
    return leaf == "weight" and module in TABLES and module in spec.adapters


def _any(variable: nnx.Variable) -> bool:
    return bool(jnp.any(variable.get_value() != 0))
