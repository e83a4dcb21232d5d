"""How much each group of linears suffers from 4 bits, and which stay in 16.

A group is the linears that share an input. With one group in 4 bits and all else
as it is, the divergence of the next token's probabilities from those of the whole
model says what the group's rounding does to the answers; per byte it says where
16 bits help most.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fastjax.models.build import DecoderSpec, linear_names, weight_places
from fastjax.models.transformer_config import TransformerConfig
from fastjax.nn.decoder import Decoder
from fastjax.nn.linear import PackedFormat
from kernels.packed import dense

Batch = Mapping[str, Int[Array, "B T"]]
_SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GroupError:
    """What 4 bits do to linears that share an input.

    Attributes:
      modules: Canonical names.
      extra_bytes: What they need more as they are than in 4 bits.
      divergence: Of the next token's probabilities when only they are in 4 bits:
        nats a token (Kullback-Leibler, from the whole model).
      activation_error: Norm of what the last hidden states change then, over theirs.
      weight_errors: Of each module, the norm of what 4 bits lose over the weight's.
    """

    modules: tuple[str, ...]
    extra_bytes: int
    divergence: float
    activation_error: float
    weight_errors: tuple[float, ...]


class Calibration:
    """A 16-bit model and what it answers to some text.

    Args:
      decoder: Its weights are changed and put back while something is measured.
      spec: Its structure, without 4-bit weights.
      batches: input_ids, positions and segment_ids of some text.
      packed: The 4-bit format.
    """

    def __init__(
        self,
        decoder: Decoder,
        spec: DecoderSpec,
        batches: Sequence[Batch],
        packed: PackedFormat,
    ) -> None:
        self._decoder, self._config, self._packed = decoder, spec.config, packed
        self._batches = batches
        self._itemsize = jnp.dtype(spec.param_dtype).itemsize
        self._places = {
            name.removesuffix(".weight"): (variable, index)
            for names, variable in weight_places(decoder, spec)
            for index, name in enumerate(names)
        }
        graphdef, state = nnx.split(decoder)
        self._expected = [_hidden(graphdef, state, batch) for batch in batches]

    def errors(self) -> Iterator[GroupError]:
        """Yields what 4 bits do to each group, from the first layer to the last."""
        for modules in linear_groups(self._config):
            weights = [self._weight(module) for module in modules]
            divergence, activation_error = self._effect(modules)
            dense_bytes = self._itemsize * sum(weight.size for weight in weights)
            held = sum(
                leaf.size * leaf.dtype.itemsize
                for weight in weights
                for leaf in jax.tree.leaves(jax.eval_shape(self._packed.pack, weight))
            )
            yield GroupError(
                modules=modules,
                extra_bytes=dense_bytes - held,
                divergence=divergence,
                activation_error=activation_error,
                weight_errors=tuple(
                    lost_share(weight, self._packed) for weight in weights
                ),
            )

    def divergence(self, modules: Iterable[str]) -> float:
        """Returns the mean divergence, in nats, with these linears in 4 bits."""
        return self._effect(modules)[0]

    def _effect(self, modules: Iterable[str]) -> tuple[float, float]:
        """Returns divergence and error of the last hidden states, likewise."""
        with self._in_4bit(modules):
            graphdef, state = nnx.split(self._decoder)
            sums = [
                _effect(graphdef, state, batch, expected)
                for batch, expected in zip(self._batches, self._expected, strict=True)
            ]
        total, tokens, changed, whole = (
            float(sum(parts)) for parts in zip(*sums, strict=True)
        )
        return total / tokens, math.sqrt(changed / whole)

    @contextlib.contextmanager
    def _in_4bit(self, modules: Iterable[str]) -> Iterator[None]:
        stacks: list[tuple[nnx.Variable, Array]] = []
        for module in modules:
            variable, index = self._places[module]
            stack = variable.get_value()
            stacks.append((variable, stack))
            rounded = self._rounded(stack[index]).astype(stack.dtype)
            variable.set_value(stack.at[index].set(rounded))
        try:
            yield
        finally:
            for variable, stack in reversed(stacks):
                variable.set_value(stack)

    def _weight(self, module: str) -> Float[Array, "I O"]:
        variable, index = self._places[module]
        return variable.get_value()[index].astype(jnp.float32)

    def _rounded(self, weight: Float[Array, "I O"]) -> Float[Array, "I O"]:
        return _rounded(weight, packed=self._packed)


def lost_share(weight: Float[Array, "I O"], packed: PackedFormat) -> float:
    """Returns the norm of what 4 bits lose of a linear over its own; 0 for zeros."""
    norm = _norm(weight)
    return _norm(weight - _rounded(weight, packed=packed)) / norm if norm else 0.0


def linear_groups(config: TransformerConfig) -> list[tuple[str, ...]]:
    """Returns the linears of each layer, those that share an input together."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in linear_names(config):
        part, _, last = name.rpartition(".")
        shared = next((group[0] for group in _SHARED_INPUTS if last in group), last)
        groups.setdefault((part, shared), []).append(name)
    return [tuple(modules) for modules in groups.values()]


def kept_in_16_bits(
    errors: Iterable[GroupError], *, budget_bytes: int
) -> list[GroupError]:
    """Returns the groups that lose most a byte, until the budget is spent."""
    kept = []
    for error in sorted(errors, key=lambda e: e.divergence / e.extra_bytes)[::-1]:
        if error.divergence > 0 and error.extra_bytes <= budget_bytes:
            kept.append(error)
            budget_bytes -= error.extra_bytes
    return kept


@functools.partial(jax.jit, static_argnames=("packed",))
def _rounded(weight: Float[Array, "I O"], *, packed: PackedFormat) -> Array:
    return dense(packed.pack(weight)).astype(jnp.float32)


def _norm(array: Float[Array, "I O"]) -> float:
    return float(jnp.sqrt(jnp.sum(jnp.square(array))))


@functools.partial(jax.jit, static_argnums=0)
def _hidden(
    graphdef: nnx.GraphDef, state: nnx.State, batch: Batch
) -> Float[Array, "B T D"]:
    return nnx.merge(graphdef, state)(
        batch["input_ids"],
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
    )


@functools.partial(jax.jit, static_argnums=0)
def _effect(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    batch: Batch,
    expected: Float[Array, "B T D"],
) -> tuple[Float[Array, ""], ...]:
    """Returns sums over tokens: KL(expected, actual), one, and the squares of what the
    hidden states change and of what they are.
    """
    decoder = nnx.merge(graphdef, state)
    is_token = (batch["segment_ids"] > 0).astype(jnp.float32)

    def row(item: tuple[Array, Array, Array]) -> Array:
        actual, wanted, mask = item
        log_q = jax.nn.log_softmax(decoder.logits(actual))
        log_p = jax.nn.log_softmax(decoder.logits(wanted))
        return jnp.sum(mask * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))

    actual = _hidden(graphdef, state, batch)
    divergence = jnp.sum(jax.lax.map(row, (actual, expected, is_token)))
    wide, wanted = (array.astype(jnp.float32) for array in (actual, expected))
    changed, whole = (
        jnp.sum(is_token[..., None] * jnp.square(array))
        for array in (wide - wanted, wanted)
    )
    return divergence, jnp.sum(is_token), changed, whole
