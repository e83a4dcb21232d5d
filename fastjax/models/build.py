"""From a configuration to a decoder: first its shapes, then its arrays."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from fastjax.config import DType, Implementations, Table
from fastjax.models.transformer_config import TransformerConfig
from fastjax.nn.attention import Attention
from fastjax.nn.block import Block
from fastjax.nn.decoder import Decoder, Segment
from fastjax.nn.embedding import Embedding
from fastjax.nn.linear import AdapterSpec, Linear, LinearSpec, PackedFormat
from fastjax.nn.mlp import GatedMLP
from fastjax.nn.norm import RMSNorm
from fastjax.nn.rope import RotaryEmbedding
from fastjax.rope_config import RopeConfig
from kernels.line import as_lines
from kernels.packed import PackedArray

type Weights = dict[str, Array | PackedArray]
type Adapters = Mapping[str, Array]

_LINEARS = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    (
        "gate_proj",
        "up_proj",
        "down_proj",
    ),
)
_FUSED_LINEARS = ("qkv_proj", "o_proj"), ("gate_up_proj", "down_proj")
_NOT_IN_CHECKPOINTS = ("lora_scaling", "windows", "ropes")
"""Variables that are numbers of the specification, not weights."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DecoderSpec:
    """Everything that decides the structure of a decoder, and no array.

    Attributes:
      config: Sizes and switches.
      param_dtype: Of dense weights.
      compute_dtype: Of activations and matrix products.
      trains_weights: Every weight trains (full fine-tuning).
      packed: Packed format of the linears that have one, by canonical module name
        such as `layers.3.mlp.up_proj`.
      adapters: Adapter of the linears that have one, by the same names, and of
        embed_tokens and lm_head.
      trained_biases: Linears whose bias trains beside the adapters.
      trained_tables: Which of embed_tokens and lm_head train beside the adapters.
      trained_tokens: Tokens whose rows of embed_tokens train instead.
      implementations: Implementation of each op; None takes the first able one.
    """

    config: TransformerConfig
    param_dtype: DType = "bfloat16"
    compute_dtype: DType = "bfloat16"
    trains_weights: bool = False
    packed: Mapping[str, PackedFormat] = dataclasses.field(default_factory=dict)
    adapters: Mapping[str, AdapterSpec] = dataclasses.field(default_factory=dict)
    trained_biases: frozenset[str] = frozenset()
    trained_tables: frozenset[Table] = frozenset()
    trained_tokens: tuple[int, ...] = ()
    implementations: Implementations = dataclasses.field(
        default_factory=Implementations
    )

    def linear(self, name: str) -> LinearSpec:
        """Returns how the linear of that canonical name is stored and trained."""
        return LinearSpec(
            dtype=jnp.dtype(self.param_dtype),
            packed=self.packed.get(name),
            adapter=self.adapters.get(name),
            trains_weight=self.trains_weights,
            trains_bias=name in self.trained_biases,
        )

    @property
    def has_4bit(self) -> bool:
        """Whether some linears are held in 4 bits."""
        return any(packed.is_4bit for packed in self.packed.values())

    @property
    def head(self) -> Table:
        """The table that gives the logits."""
        return "embed_tokens" if self.config.tie_word_embeddings else "lm_head"

    @property
    def trains_head(self) -> bool:
        """Whether the table that gives the logits trains, not an adapter beside it."""
        has_rows = self.head == "embed_tokens" and bool(self.trained_tokens)
        return self.trains_weights or has_rows or self.head in self.trained_tables

    def segments(self) -> list[range]:
        """Returns the runs of consecutive layers that share one structure."""
        layers = range(self.config.num_hidden_layers)
        runs = itertools.groupby(layers, key=self._layer_structure)
        grouped = [list(run) for _, run in runs]
        return [range(run[0], run[-1] + 1) for run in grouped]

    def _layer_structure(self, layer: int) -> tuple[LinearSpec, ...]:
        names = layer_linears(self.config)
        specs = (self.linear(f"layers.{layer}.{name}") for name in names)
        return tuple(_without_scaling(spec) for spec in specs)


def layer_linears(config: TransformerConfig) -> tuple[str, ...]:
    """Returns the module name of every linear of a layer, within the layer."""
    attention, mlp = _FUSED_LINEARS if config.has_fused_projections else _LINEARS
    return tuple(
        f"{part}.{name}"
        for part, names in (("self_attn", attention), ("mlp", mlp))
        for name in names
    )


def linear_names(config: TransformerConfig) -> tuple[str, ...]:
    """Returns the canonical module name of every linear of the layers."""
    layers, names = range(config.num_hidden_layers), layer_linears(config)
    return tuple(f"layers.{layer}.{name}" for layer in layers for name in names)


def abstract_decoder(spec: DecoderSpec) -> Decoder:
    """Returns the decoder of `spec` with shapes in the place of weights."""
    config = spec.config
    return Decoder(
        embed_tokens=_table(spec, "embed_tokens"),
        segments=[_segment(spec, layers) for layers in spec.segments()],
        norm=_norm(spec, config.hidden_size),
        lm_head=None if config.tie_word_embeddings else _table(spec, "lm_head"),
        rotary=RotaryEmbedding(config.head_dim, _kinds_of_rope(config)),
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        compute_dtype=jnp.dtype(spec.compute_dtype),
        embedding_scale=config.embedding_scale,
        logit_scale=config.logit_scale,
        logit_softcap=config.logit_softcap,
    )


def build_decoder(spec: DecoderSpec, weights: Weights) -> Decoder:
    """Returns the decoder of `spec` with the given weights, which it takes out.

    Shapes must be right: the conversions have checked them.

    Raises:
      ValueError: Weights are missing, or have no place.
    """
    decoder = abstract_decoder(spec)
    missing = place_weights(decoder, spec, weights)
    if missing or weights:
        raise ValueError(f"missing {missing[:10]}, without a place {[*weights][:10]}")
    return decoder


def place_weights(decoder: Decoder, spec: DecoderSpec, weights: Weights) -> list[str]:
    """Moves `weights` into the decoder and returns the names that were not there.

    Each weight leaves `weights` as it is stacked, so that only one stack is held
    twice. A stack is placed when all its layers are there.
    """
    missing = []
    for names, variable in weight_places(decoder, spec):
        absent = [name for name in names if name not in weights]
        missing += absent
        if not absent:
            pieces = [weights.pop(name) for name in names]
            value = _stacked(pieces) if _is_layer(names[0]) else pieces[0]
            variable.set_value(value)
    return missing


def flat_weights(
    decoder: Decoder,
    spec: DecoderSpec,
    *,
    wanted: Callable[[str], bool] = lambda name: True,
) -> Iterator[tuple[str, Any]]:
    """Yields (canonical name, array) of the wanted weights, one layer at a time."""
    for names, variable in weight_places(decoder, spec):
        value = variable.get_value()
        for index, name in enumerate(names):
            if not wanted(name):
                continue
            if _is_layer(name):
                yield name, jax.tree.map(lambda leaf, i=index: leaf[i], value)
            else:
                yield name, value


def weight_places(
    decoder: Decoder, spec: DecoderSpec
) -> Iterator[tuple[list[str], nnx.Variable]]:
    """Yields each weight's variable with its canonical names, one a stacked layer."""
    segments = spec.segments()
    for path, variable in nnx.to_flat_state(nnx.state(decoder)):
        if path[-1] in _NOT_IN_CHECKPOINTS:
            continue
        if path[0] == "segments":
            module = ".".join(map(str, path[3:]))
            layers = segments[int(str(path[1]))]
            yield [f"layers.{layer}.{module}" for layer in layers], variable
        else:
            yield [".".join(map(str, path))], variable


def _table(spec: DecoderSpec, name: Table) -> Embedding:
    is_beside_adapters = name in spec.trained_tables
    return Embedding(
        spec.config.vocab_size,
        spec.config.hidden_size,
        dtype=jnp.dtype("float32" if is_beside_adapters else spec.param_dtype),
        is_trainable=spec.trains_weights or is_beside_adapters,
        tokens=spec.trained_tokens if name == "embed_tokens" else (),
        adapter=spec.adapters.get(name),
        is_head=name == "lm_head",
    )


def _segment(spec: DecoderSpec, layers: range) -> Segment:
    block = _block(spec, layers[0])
    for path, variable in nnx.to_flat_state(nnx.state(block)):
        if path[-1] == "lora_scaling":
            module = ".".join(map(str, path[:-1]))
            scalings = [spec.adapters[f"layers.{i}.{module}"].scaling for i in layers]
            variable.set_value(as_lines(np.asarray(scalings)))
        else:
            variable.set_value(_with_layer_axis(variable.get_value(), len(layers)))
    kinds = _kinds_of_rope(spec.config)
    windows = [spec.config.windows[layer] for layer in layers]
    ropes = [kinds.index(spec.config.ropes[layer]) for layer in layers]
    everything = jnp.iinfo(jnp.int32).max
    sizes = [everything if window is None else window for window in windows]
    return Segment(
        block,
        num_layers=len(layers),
        window=windows[0],
        windows=_unless_equal(sizes),
        rope=ropes[0],
        ropes=_unless_equal(ropes),
    )


def _unless_equal(values: list[int]) -> Int[Array, " L"] | None:
    return jnp.asarray(values, jnp.int32) if len(set(values)) > 1 else None


def _kinds_of_rope(config: TransformerConfig) -> tuple[RopeConfig, ...]:
    return tuple(dict.fromkeys(config.ropes))


def _block(spec: DecoderSpec, layer: int) -> Block:
    config = spec.config

    def make_linear(name: str, inputs: int, outputs: int, has_bias: bool) -> Linear:
        return Linear(
            inputs,
            outputs,
            has_bias=has_bias,
            spec=spec.linear(f"layers.{layer}.{name}"),
            implementation=spec.implementations.lora_matmul,
        )

    return Block(
        lambda: _norm(spec, config.hidden_size),
        norm_placement=config.norm_placement,
        residual_scale=config.residual_scale,
        self_attn=Attention(
            make_linear,
            lambda features: _norm(spec, features),
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            has_bias=config.attention_bias,
            has_out_bias=config.attention_out_bias,
            is_fused=config.has_fused_projections,
            qk_norm=config.qk_norm,
            scale=config.attention_scale,
            softcap=config.attention_softcap,
            implementations=spec.implementations,
        ),
        mlp=GatedMLP(
            make_linear,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            has_bias=config.mlp_bias,
            is_fused=config.has_fused_projections,
            activation=config.hidden_act,
            implementations=spec.implementations,
        ),
    )


def _norm(spec: DecoderSpec, features: int) -> RMSNorm:
    return RMSNorm(
        features,
        eps=spec.config.rms_norm_eps,
        offset=spec.config.norm_offset,
        dtype=jnp.dtype(spec.param_dtype),
        is_trainable=spec.trains_weights,
        implementation=spec.implementations.rms_norm,
    )


def _without_scaling(spec: LinearSpec) -> LinearSpec:
    if spec.adapter is None:
        return spec
    return dataclasses.replace(
        spec, adapter=dataclasses.replace(spec.adapter, scaling=0.0)
    )


def _with_layer_axis(value: Any, layers: int) -> Any:
    def stacked(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((layers, *leaf.shape), leaf.dtype)

    return jax.tree.map(stacked, value)


def _stacked(pieces: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *pieces)


def _is_layer(name: str) -> bool:
    return name.startswith("layers.")


def num_weights(*states: nnx.State) -> int:
    """Returns how many weights variables hold; a 4-bit weight counts as one."""
    return sum(
        _weights_in(variable.get_value())
        for state in states
        for path, variable in nnx.to_flat_state(state)
        if path[-1] not in _NOT_IN_CHECKPOINTS
    )


def _weights_in(value: Any) -> int:
    if not isinstance(value, PackedArray):
        return int(value.size)
    layers = value.absmax.shape[:-1]
    return math.prod(layers) * value.size
