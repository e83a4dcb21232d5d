"""A linear layer: frozen 4-bit or 16-bit weight, optional adapter, optional bias."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from fastjax.nn.variables import Frozen, LoRAParam, abstract, variable
from kernels import int8, nf4
from kernels.line import as_lines
from kernels.lora_matmul import Projection, lora_matmul_group
from kernels.packed import PackedArray


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PackedFormat:
    """How a weight of fewer bits is stored.

    Attributes:
      code: Table of the sixteen values of 4 bits (2305.14314 section 3), or 8 bits
        with a scale for each output (2208.07339).
      double_quant: The block scales of 4 bits are themselves 8-bit.
      dtype: Of the dequantised values, which are rounded to it.
    """

    code: Literal["nf4", "fp4", "int8"] = "nf4"
    double_quant: bool = True
    dtype: str = "bfloat16"

    @property
    def is_4bit(self) -> bool:
        """Whether it is of 4 bits."""
        return self.code != "int8"

    def pack(self, weight: Float[Array, "I O"]) -> PackedArray:
        """Returns the weight, rounded to `dtype`, in this format."""
        rounded = weight.astype(self.dtype)
        if self.code == "int8":
            return int8.quantize(rounded)
        return nf4.quantize(rounded, code=self.code, double_quant=self.double_quant)

    def abstract(self, shape: tuple[int, int]) -> PackedArray:
        """Returns the shapes of a packed weight."""
        return _abstract_packed(self, shape)


@functools.cache
def _abstract_packed(packed: PackedFormat, shape: tuple[int, int]) -> PackedArray:
    # A model has hundreds of weights and a handful of shapes.
    return jax.eval_shape(packed.pack, abstract(shape, jnp.dtype(packed.dtype)))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSpec:
    """Shape and kind of one adapter (2106.09685).

    Attributes:
      rank: R.
      scaling: Factor of the product: alpha / R, or alpha / sqrt(R) for rsLoRA.
      dropout: Share of the adapter's input dropped while training.
      is_dora: It also trains a magnitude per output feature (2402.09353).
      has_bias: Its up projection has a bias.
    """

    rank: int
    scaling: float
    dropout: float = 0.0
    is_dora: bool = False
    has_bias: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LinearSpec:
    """How the weight of one linear is stored and what of it trains.

    Attributes:
      dtype: Of a dense weight, and of the bias.
      packed: 4-bit format; None keeps the weight dense.
      adapter: None for a plain linear.
      trains_weight: Weight and bias train (full fine-tuning).
      trains_bias: The bias trains beside an adapter.
    """

    dtype: jnp.dtype
    packed: PackedFormat | None = None
    adapter: AdapterSpec | None = None
    trains_weight: bool = False
    trains_bias: bool = False


class Linear(nnx.Module):
    """`x @ weight + scaling * (x @ lora_a) @ lora_b + bias`, by `kernels.lora_matmul`.

    Born abstract: its variables hold shapes until `models.build` fills them.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        has_bias: bool,
        spec: LinearSpec,
        implementation: str | None = None,
    ) -> None:
        shape = (in_features, out_features)
        weight = (
            abstract(shape, spec.dtype)
            if spec.packed is None
            else spec.packed.abstract(shape)
        )
        trains_bias = spec.trains_weight or spec.trains_bias
        bias_dtype = jnp.dtype(jnp.float32) if trains_bias else spec.dtype
        bias = abstract((out_features,), bias_dtype)
        self.weight = variable(weight, is_trainable=spec.trains_weight)
        self.bias = variable(bias, is_trainable=trains_bias) if has_bias else None
        adapter, f32 = spec.adapter, jnp.dtype(jnp.float32)
        rank = 0 if adapter is None else adapter.rank
        is_dora = adapter is not None and adapter.is_dora
        self.lora_a = _parameter((in_features, rank), f32) if adapter else None
        self.lora_b = _parameter((rank, out_features), f32) if adapter else None
        self.lora_magnitude = _parameter((out_features,), f32) if is_dora else None
        has_up_bias = adapter is not None and adapter.has_bias
        self.lora_b_bias = _parameter((out_features,), f32) if has_up_bias else None
        # A line of it, which kernels read where it lies in a stack of layers.
        self.lora_scaling = Frozen(as_lines(adapter.scaling)) if adapter else None
        self.lora_dropout = adapter.dropout if adapter else 0.0
        self.implementation = implementation

    def __call__(
        self,
        x: Float[Array, "*B I"],
        *,
        dropout_key: PRNGKeyArray | None = None,
        residual: Float[Array, "*B O"] | None = None,
    ) -> Float[Array, "*B O"]:
        """Returns the projection of `x`; dropout acts when a key is given.

        A residual is added to it, by the same kernel where there is one.
        """
        return project(x, (self,), dropout_key=dropout_key, residual=residual)[0]

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter acts beside the weight."""
        return self.lora_a is not None

    def projection(self) -> Projection:
        """Returns the arrays of this layer as the matmul takes them."""
        return Projection(
            weight=self.weight.get_value(),
            bias=self._whole_bias(),
            lora_a=_value(self.lora_a),
            lora_b=_value(self.lora_b),
            scaling=_value(self.lora_scaling),
            magnitude=_value(self.lora_magnitude),
        )

    def _whole_bias(self) -> Float[Array, " O"] | None:
        """Returns the bias of the layer and that of its adapter as one."""
        own = _value(self.bias)
        if self.lora_b_bias is None or self.lora_scaling is None:
            return own
        added = self.lora_scaling.get_value()[0] * self.lora_b_bias.get_value()
        return added if own is None else own.astype(jnp.float32) + added


def project(
    x: Float[Array, "*B I"],
    linears: Sequence[Linear],
    *,
    dropout_key: PRNGKeyArray | None = None,
    residual: Float[Array, "*B _"] | None = None,
) -> tuple[Float[Array, "*B _"], ...]:
    """Returns the projections of one input by several linears, in one fused op.

    Args:
      x: Shared input.
      linears: They share `x`, for example q, k and v.
      dropout_key: Each linear's adapter drops its own entries of `x`; None drops none.
      residual: Added to the projection of the only linear.
    """
    if isinstance(linears[0].weight, nnx.Param):
        assert not any(linear.has_adapter for linear in linears)
        dense = tuple(_dense(x, linear) for linear in linears)
        return dense if residual is None else (dense[0] + residual,)
    rate, keys = adapter_dropout(linears, dropout_key)
    return lora_matmul_group(
        x,
        tuple(linear.projection() for linear in linears),
        residual=residual,
        dropout_rate=rate,
        dropout_keys=keys,
        implementation=linears[0].implementation,
    )


def adapter_dropout(
    linears: Sequence[Linear], dropout_key: PRNGKeyArray | None
) -> tuple[float, tuple[PRNGKeyArray | None, ...]]:
    """Returns the rate of linears that share an input, and a key for each."""
    rate = max(linear.lora_dropout for linear in linears)
    if dropout_key is None or rate == 0:
        return 0.0, (None,) * len(linears)
    return rate, tuple(jax.random.fold_in(dropout_key, i) for i in range(len(linears)))


def _dense(x: Float[Array, "*B I"], linear: Linear) -> Float[Array, "*B O"]:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    weight = linear.weight.get_value().astype(x.dtype)
    y = jnp.matmul(x, weight, precision=precision)
    if linear.bias is None:
        return y
    return y + jnp.broadcast_to(linear.bias.get_value().astype(x.dtype), y.shape)


def _parameter(shape: tuple[int, ...], dtype: jnp.dtype) -> LoRAParam:
    return LoRAParam(abstract(shape, dtype))


def _value(held: nnx.Variable | None) -> Array | None:
    return None if held is None else held.get_value()
