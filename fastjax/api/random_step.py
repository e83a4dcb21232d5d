"""The training step of a preset on random weights made on the device."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PyTree

from fastjax import lora as adapters
from fastjax import runtime
from fastjax.api.memory import Planner, planned_spec
from fastjax.config import (
    DType,
    Implementations,
    LoRAConfig,
    OptimizerConfig,
    QuantConfig,
    RematChoice,
    TrainConfig,
)
from fastjax.errors import ConfigError
from fastjax.losses import cross_entropy
from fastjax.models.build import DecoderSpec, abstract_decoder
from fastjax.models.registry import preset
from fastjax.nn.linear import PackedFormat
from fastjax.remat import RematPlan
from fastjax.train import CompiledSteps, init_state, make_optimizer, make_train_step
from fastjax.train.batches import DeviceBatch
from fastjax.train.compiled import StepMemory
from fastjax.train.memory_plan import BatchShape
from fastjax.train.state import TrainState, abstract_state

type Parts = tuple[nnx.GraphDef, PyTree, PyTree]
"""Structure, trained variables and all others of a decoder."""

_CODE_DEVIATION = 0.02
_SCHEDULE_STEPS = 1000


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepArgs:
    """The QLoRA step: NF4 base, adapters on all linears, AdamW, full rows.

    Attributes:
      model: Preset name.
      layers: Of the model, the first ones, which compile sooner; 0 takes all.
      batch: Rows of a step.
      seq: Tokens of a row.
      lora_r: Rank of the adapters.
      remat: What the backward pass recomputes.
      unroll_layers: The layers are written out in the program: a faster step, a longer
        compilation.
      memory_gib: Of the device, for remat "auto"; 0 takes all that JAX may take.
      documents: Documents packed into each row, of equal length.
      attention: Implementation of attention; None takes the first able one.
      dtype: Of activations and products; the weights are the same in each.
      full_finetuning: All weights train, in float32, and there are no adapters.
      offload_optimizer: Its states wait in host memory.
    """

    model: str = "llama3-8b"
    layers: int = 0
    batch: int = 2
    seq: int = 4096
    lora_r: int = 16
    remat: RematChoice = "attention"
    unroll_layers: bool = False
    memory_gib: float = 0.0
    documents: int = 1
    attention: str | None = None
    dtype: DType = "bfloat16"
    full_finetuning: bool = False
    offload_optimizer: bool = False


class RandomStep:
    """A step, its state and its batches.

    Attributes:
      compiled: Step of each shape of batch.
      state: Donated to the next step.
    """

    def __init__(
        self,
        config: TrainConfig,
        spec: DecoderSpec,
        remat: RematPlan,
        shape: BatchShape,
        *,
        parts: Parts | None = None,
        compiler_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Takes weights, or makes random ones.

        Args:
          config: Optimiser, dropout, noise and implementations.
          spec: Structure of the model, with its adapters.
          remat: What the backward pass recomputes.
          shape: Of the batches; documents of a row are of equal length.
          parts: Structure and weights, whose trained ones the step consumes; with
            shapes in the place of weights the step runs after `load` only.
          compiler_options: Beside those of training.
        """
        graphdef, trainable, frozen = parts or random_parts(spec)
        self.vocab_size = spec.config.vocab_size
        self.shape = shape
        optimizer = make_optimizer(config.optimizer, _SCHEDULE_STEPS)
        loss = functools.partial(
            cross_entropy,
            graphdef,
            max_segments=shape.documents,
            remat=remat,
            head_is_trainable=spec.trains_head,
            neftune_noise_alpha=config.data.neftune_noise_alpha,
            implementation=config.implementations.cross_entropy,
        )
        self.compiled = CompiledSteps(
            make_train_step(
                loss,
                optimizer,
                seed=0,
                has_dropout=config.has_dropout,
                dtype=spec.compute_dtype,
            ),
            frozen,
            before_compile=lambda: None,
            compiler_options={
                **runtime.step_compiler_options(remat.policies),
                **(compiler_options or {}),
            },
        )
        self._start = functools.partial(
            init_state, optimizer=optimizer, dtype=spec.compute_dtype
        )
        is_abstract = isinstance(jax.tree.leaves(trainable)[0], jax.ShapeDtypeStruct)
        self.state: TrainState = (
            abstract_state(trainable, optimizer, spec.compute_dtype)
            if is_abstract
            else self._start(trainable)
        )

    def __call__(self, seed: int) -> float:
        """Runs a step on the batch of that seed, to its end, and returns the loss."""
        self.state, metrics = self.compiled(self.state, self._batch(seed))
        return float(metrics["loss"])

    def load(self, parts: Parts) -> None:
        """Takes weights in the place of shapes; the trained ones are consumed."""
        _, trainable, self.compiled.frozen = parts
        self.state = self._start(trainable)

    def compile(self) -> StepMemory | None:
        """Compiles the step and returns its memory, None where XLA does not tell."""
        self.compiled.compile(self.state, self._batch(0))
        return self.compiled.memory

    def _batch(self, seed: int) -> DeviceBatch:
        """Returns a batch of random tokens without padding."""
        shape = (self.shape.accumulation, self.shape.rows, self.shape.tokens)
        generator = np.random.default_rng(seed)
        ids = generator.integers(0, self.vocab_size, shape, np.int32)
        length = -(-self.shape.tokens // self.shape.documents)
        places = np.arange(self.shape.tokens, dtype=np.int32)
        arrays = {
            "input_ids": ids,
            "targets": np.roll(ids, -1, axis=-1),
            "positions": np.broadcast_to(places % length, shape),
            "segment_ids": np.broadcast_to(places // length + 1, shape),
        }
        return DeviceBatch(
            arrays=jax.device_put(arrays),
            num_tokens=ids.size,
            num_rows=shape[0] * shape[1],
        )


def planner_of(args: StepArgs) -> Planner:
    """Returns the planner of the preset, with NF4 weights unless all train."""
    settings = TrainConfig(
        model=args.model,
        lora=LoRAConfig(lora_r=args.lora_r),
        remat=args.remat,
        dtype=args.dtype,
        unroll_layers=args.unroll_layers,
        memory_gib=args.memory_gib,
        per_device_train_batch_size=args.batch,
        gradient_accumulation_steps=1,
        implementations=Implementations(attention=args.attention),
        full_finetuning=args.full_finetuning,
        optimizer=OptimizerConfig(offload_optimizer=args.offload_optimizer),
        quant=QuantConfig(load_in_4bit=not args.full_finetuning),
    )
    spec = planned_spec(settings, preset(args.model).config)
    if not args.full_finetuning:
        packed = dict.fromkeys(spec.packed, PackedFormat())
        spec = dataclasses.replace(spec, param_dtype="bfloat16", packed=packed)
    spec = shortened(spec, args.layers) if args.layers else spec
    return Planner.of(settings, spec, tokens=args.seq, documents=args.documents)


def shortened(spec: DecoderSpec, layers: int) -> DecoderSpec:
    """Returns the structure with so many layers, the first ones.

    Raises:
      ConfigError: The model has fewer, or there are none.
    """
    config = spec.config
    if not 1 <= layers <= config.num_hidden_layers:
        raise ConfigError(
            f"{layers=} of a model that has {config.num_hidden_layers}",
            fix="give a number from 1 to that; --layers 0 takes all",
        )
    few = dataclasses.replace(
        config,
        num_hidden_layers=layers,
        layer_windows=tuple(config.windows[:layers]),
        layers_without_rope=tuple(i for i in config.layers_without_rope if i < layers),
    )
    return dataclasses.replace(spec, config=few)


def random_parts(spec: DecoderSpec) -> Parts:
    """Returns a decoder whose weights are drawn on the device, in parts."""
    plain = adapters.plain_spec(spec)
    decoder = abstract_decoder(plain)
    for index, (path, variable) in enumerate(nnx.to_flat_state(nnx.state(decoder))):
        if path[-1] in ("windows", "ropes"):
            continue
        key = jax.random.key(index)
        is_norm = "norm" in str(path[-2])
        like = variable.get_value()
        # Compiled, so that no wider copy of a stack of weights ever exists.
        make = jax.jit(functools.partial(_random_value, like, is_norm=is_norm))
        variable.set_value(make(key))
    if spec.adapters:
        decoder = adapters.with_adapters(decoder, plain, spec, jax.random.key(0))
    graphdef, trainable, frozen = nnx.split(decoder, nnx.Param, ...)
    return graphdef, *jax.block_until_ready((trainable, frozen))


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
