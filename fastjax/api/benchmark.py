"""Speed and memory of the training step on random weights of a preset's shapes."""

import dataclasses
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fastjax import lora as adapters
from fastjax import runtime
from fastjax.config import (
    Implementations,
    LoRAConfig,
    OptimizerConfig,
    RematPolicy,
)
from fastjax.losses import cross_entropy
from fastjax.models.build import DecoderSpec, abstract_decoder, linear_names
from fastjax.models.registry import preset
from fastjax.nn.decoder import Decoder
from fastjax.nn.linear import PackedFormat
from fastjax.train import CompiledSteps, init_state, make_optimizer, make_train_step

_WARM_UP_STEPS = 3
_CODE_DEVIATION = 0.02
_GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkArgs:
    """Times the QLoRA step: NF4 base, rank 16 on all linears, AdamW, full rows.

    Attributes:
      model: Preset name.
      batch: Rows of a step.
      seq: Tokens of a row.
      remat: What the backward pass recomputes.
      steps: Timed steps, after three that are not.
      documents: Documents packed into each row, of equal length.
      attention: Implementation of attention; None takes the first able one.
      out: JSON file that is written; None writes none.
    """

    model: str = "llama3-8b"
    batch: int = 2
    seq: int = 4096
    remat: RematPolicy = "attention"
    steps: int = 10
    documents: int = 1
    attention: str | None = None
    out: str | None = None


def run_benchmark(args: BenchmarkArgs) -> dict[str, Any]:
    """Returns, and writes, what one process measured; peak memory is of this run."""
    runtime.configure()
    started = time.perf_counter()
    decoder = random_decoder(args)
    graphdef, trainable, frozen = nnx.split(decoder, nnx.Param, ...)
    del decoder
    jax.block_until_ready((trainable, frozen))
    resident = _device_bytes("bytes_in_use")
    loaded = time.perf_counter()
    optimizer = make_optimizer(OptimizerConfig(max_grad_norm=1.0), 1000)

    def loss(trainable: Any, frozen: Any, batch: Any, *, dropout_key: Any) -> Any:
        return cross_entropy(
            graphdef,
            trainable,
            frozen,
            batch,
            dropout_key=dropout_key,
            max_segments=args.documents,
            remat=args.remat,
        )

    step = CompiledSteps(
        make_train_step(loss, optimizer, seed=0, dtype="bfloat16"),
        frozen,
        before_compile=lambda: None,
    )
    state = init_state(trainable, optimizer, "bfloat16")
    batches = [_batch(args, seed) for seed in range(_WARM_UP_STEPS + args.steps)]
    seconds, losses = [], []
    for batch in batches:
        start = time.perf_counter()
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[_WARM_UP_STEPS:])
    memory = step.memory
    result = {
        **dataclasses.asdict(args),
        "tokens_per_second": args.batch * args.seq / median,
        "step_milliseconds": median * 1e3,
        "peak_gib": _gib(_device_bytes("peak_bytes_in_use")),
        "resident_gib": _gib(resident),
        "temp_gib": None if memory is None else memory.temp_bytes / _GIB,
        "compile_seconds": step.compile_seconds,
        "weights_seconds": loaded - started,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "implementations": step.implementations,
        **_environment(),
    }
    if args.out is not None:
        path = Path(args.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")
    return result


def random_decoder(args: BenchmarkArgs) -> Decoder:
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


@dataclasses.dataclass(frozen=True)
class _Batch:
    arrays: dict[str, jax.Array]
    shape: tuple[int, ...]


def _batch(args: BenchmarkArgs, seed: int) -> Any:
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
    return _Batch(jax.device_put(arrays), shape)


def _device_bytes(name: str) -> int | None:
    stats = jax.local_devices()[0].memory_stats()
    return None if stats is None else stats.get(name)


def _gib(count: int | None) -> float | None:
    return None if count is None else count / _GIB


def _environment() -> dict[str, Any]:
    device = jax.local_devices()[0]
    packages = ("jax", "jaxlib", "flax", "optax")
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "commit": os.environ.get("GIT_COMMIT") or _commit(),
        "command": " ".join(sys.argv),
    }


def _commit() -> str | None:
    """Returns the commit of the checkout, None outside of one (set `GIT_COMMIT`)."""
    git = ["git", "rev-parse", "--verify", "--quiet", "HEAD"]
    found = subprocess.run(git, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None
