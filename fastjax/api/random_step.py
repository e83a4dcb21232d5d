"""The training step of a preset on random weights made on the device."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fastjax import lora as adapters
from fastjax import runtime
from fastjax.config import Implementations, LoRAConfig, OptimizerConfig, RematPolicy
from fastjax.losses import cross_entropy
from fastjax.models.build import DecoderSpec, abstract_decoder, linear_names
from fastjax.models.registry import preset
from fastjax.nn.decoder import Decoder
from fastjax.nn.linear import PackedFormat
from fastjax.remat import RematPlan
from fastjax.train import CompiledSteps, init_state, make_optimizer, make_train_step
from fastjax.train.batches import DeviceBatch
from fastjax.train.state import TrainState

_CODE_DEVIATION = 0.02


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepArgs:
    """The QLoRA step: NF4 base, rank 16 on all linears, AdamW, full rows.

    Attributes:
      model: Preset name.
      batch: Rows of a step.
      seq: Tokens of a row.
      remat: What the backward pass recomputes.
      unroll_layers: The layers are written out in the program: a faster step, a longer
        compilation.
      documents: Documents packed into each row, of equal length.
      attention: Implementation of attention; None takes the first able one.
    """

    model: str = "llama3-8b"
    batch: int = 2
    seq: int = 4096
    remat: RematPolicy = "attention"
    unroll_layers: bool = False
    documents: int = 1
    attention: str | None = None


class RandomStep:
    """A compiled step, its state and its batches.

    Attributes:
      compiled: Step of each shape of batch.
      state: Donated to the next step.
    """

    def __init__(
        self, args: StepArgs, *, compiler_options: Mapping[str, Any] | None = None
    ) -> None:
        layers = preset(args.model).config.num_hidden_layers
        remat = RematPlan(
            policies=(args.remat,) * layers, is_unrolled=args.unroll_layers
        )
        self.args = args
        graphdef, trainable, frozen = nnx.split(random_decoder(args), nnx.Param, ...)
        jax.block_until_ready((trainable, frozen))
        optimizer = make_optimizer(OptimizerConfig(max_grad_norm=1.0), 1000)
        loss = functools.partial(
            cross_entropy,
            graphdef,
            max_segments=args.documents,
            remat=remat,
        )
        self.compiled = CompiledSteps(
            make_train_step(loss, optimizer, seed=0, dtype="bfloat16"),
            frozen,
            before_compile=lambda: None,
            compiler_options={
                **runtime.step_compiler_options(remat.policies),
                **(compiler_options or {}),
            },
        )
        self.state: TrainState = init_state(trainable, optimizer, "bfloat16")

    def __call__(self, seed: int) -> float:
        """Runs a step on the batch of that seed, to its end, and returns the loss."""
        self.state, metrics = self.compiled(self.state, random_batch(self.args, seed))
        return float(metrics["loss"])


def random_decoder(args: StepArgs) -> Decoder:
    """Returns a QLoRA decoder whose weights are drawn on the device."""
    config = preset(args.model).config
    plain = DecoderSpec(
        config=config,
        packed=dict.fromkeys(linear_names(config), PackedFormat()),
        implementations=Implementations(attention=args.attention),
    )
    adapted = adapters.adapted_spec(plain, LoRAConfig())
    decoder = abstract_decoder(plain)
    for index, (path, variable) in enumerate(nnx.to_flat_state(nnx.state(decoder))):
        key = jax.random.key(index)
        is_norm = "norm" in str(path[-2])
        like = variable.get_value()
        # Compiled, so that no wider copy of a stack of weights ever exists.
        make = jax.jit(functools.partial(_random_value, like, is_norm=is_norm))
        variable.set_value(make(key))
    return adapters.with_adapters(decoder, plain, adapted, jax.random.key(0))


def random_batch(args: StepArgs, seed: int) -> DeviceBatch:
    """Returns a batch of random tokens without padding."""
    vocabulary = preset(args.model).config.vocab_size
    shape = (1, args.batch, args.seq)
    ids = np.random.default_rng(seed).integers(0, vocabulary, shape, np.int32)
    length = -(-args.seq // args.documents)
    places = np.arange(args.seq, dtype=np.int32)
    arrays = {
        "input_ids": ids,
        "targets": np.roll(ids, -1, axis=-1),
        "positions": np.broadcast_to(places % length, shape),
        "segment_ids": np.broadcast_to(places // length + 1, shape),
    }
    return DeviceBatch(
        arrays=jax.device_put(arrays),
        num_tokens=args.batch * args.seq,
        num_rows=args.batch,
    )


def _random_value(value: Any, key: Any, *, is_norm: bool) -> Any:
    """Returns random leaves; 4-bit scales give weights of deviation 0.02."""
    if is_norm:
        return jnp.ones(value.shape, value.dtype)

    def leaf(path: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
        name = path[-1].name if path else ""
        if like.dtype == jnp.uint8:
            return jax.random.bits(key, like.shape, jnp.uint8)
        if name in ("nested_absmax", "nested_offset"):
            size = 0.01 if name == "nested_absmax" else 2.5 * _CODE_DEVIATION
            return jnp.full(like.shape, size, like.dtype)
        return jax.random.normal(key, like.shape, like.dtype) * jnp.asarray(
            _CODE_DEVIATION, like.dtype
        )

    return jax.tree_util.tree_map_with_path(leaf, value)
