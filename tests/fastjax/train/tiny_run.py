"""A very small training job: by import for tests, by `runpy` for processes to kill."""

import dataclasses
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console

from fastjax.config import (
    LoRAConfig,
    OptimizerConfig,
    QuantConfig,
    ReportConfig,
    TrainConfig,
)
from fastjax.remat import RematPlan
from fastjax.train.job import Job
from fastjax.train.loop import run
from fastjax.train.result import TrainResult

VOCABULARY, WIDTH, LENGTH = 31, 16, 12


class Frozen(nnx.Variable):
    """What does not train."""


class TinyModel(nnx.Module):
    """Embedding, one adapted layer that sees the token before, and a head."""

    logit_softcap: float | None = None

    def __init__(self, seed: int = 0, dtype: jnp.dtype = jnp.float32) -> None:
        keys = iter(jax.random.split(jax.random.key(seed), 4))
        self.table = Frozen(jax.random.normal(next(keys), (VOCABULARY, WIDTH), dtype))
        self.weight = Frozen(jax.random.normal(next(keys), (WIDTH, WIDTH), dtype) * 0.3)
        self.lora_a = nnx.Param(jax.random.normal(next(keys), (WIDTH, 4)) * 0.3)
        self.lora_b = nnx.Param(jax.random.normal(next(keys), (4, WIDTH)) * 0.3)

    def __call__(
        self,
        input_ids: jax.Array,
        *,
        positions: jax.Array,
        segment_ids: jax.Array | None = None,
        max_segments: int | None = None,
        dropout_key: jax.Array | None = None,
        embedding_noise: jax.Array | None = None,
        remat: RematPlan | None = None,
    ) -> jax.Array:
        """Returns hidden states (B, S, WIDTH)."""
        table = self.table.get_value()
        x = table[input_ids]
        before = jnp.where((positions > 0)[..., None], jnp.roll(x, 1, axis=1), x)
        x = x + 0.5 * before
        adapted = x
        if dropout_key is not None:
            kept = jax.random.bernoulli(dropout_key, 0.8, x.shape)
            adapted = jnp.where(kept, x / 0.8, jnp.zeros_like(x))
        a = self.lora_a.get_value().astype(x.dtype)
        b = self.lora_b.get_value().astype(x.dtype)
        return jnp.tanh(x @ self.weight.get_value() + adapted @ a @ b)

    def head_weight(self) -> jax.Array:
        """Returns the (V, D) output table."""
        return self.table.get_value()

    def head_adapter(self, hidden: jax.Array, *, dropout_key: object) -> None:
        """Returns None: the head has no adapter."""


def split(seed: int = 0, dtype: jnp.dtype = jnp.float32) -> tuple:
    """Returns (graphdef, trainable, frozen) of a new model."""
    return nnx.split(TinyModel(seed, dtype), nnx.Param, ...)


def rows(seed: int, count: int) -> dict[str, np.ndarray]:
    """Returns arrays (count, LENGTH) of rows with unequal numbers of tokens."""
    random = np.random.default_rng(seed)
    lengths = random.integers(2, LENGTH + 1, size=(count, 1))
    is_token = np.arange(LENGTH) < lengths
    ids = random.integers(1, VOCABULARY, size=(count, LENGTH + 1))
    ids[:, 1::2] = (ids[:, 0:-1:2] * 7 + 3) % VOCABULARY
    has_loss = is_token & (np.arange(LENGTH) >= 1)
    batch = {
        "input_ids": np.where(is_token, ids[:, :-1], 0),
        "targets": np.where(has_loss, ids[:, 1:], -100),
        "positions": np.where(is_token, np.arange(LENGTH)[None], 0),
        "segment_ids": is_token,
    }
    return {name: array.astype(np.int32) for name, array in batch.items()}


@dataclasses.dataclass
class TinyLoader:
    """Random rows; a pure function of (seed, step)."""

    seed: int = 0
    micro_batches: int = 2
    batch_rows: int = 2
    steps_per_epoch: int = 4
    max_segments: int | None = 1
    masked: bool = False

    @property
    def fingerprint(self) -> str:
        return f"tiny-{self.seed}"

    def batch(self, step: int) -> dict[str, np.ndarray]:
        shape = (self.micro_batches, self.batch_rows, LENGTH)
        flat = rows(1000 * self.seed + step, self.micro_batches * self.batch_rows)
        if self.masked:
            flat["targets"] = np.full_like(flat["targets"], -100)
        return {name: array.reshape(shape) for name, array in flat.items()}


def write_adapter(folder: Path, trainable: nnx.State) -> None:
    """Writes two files whose bytes depend on the weights alone."""
    arrays = {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(trainable)[0]
    }
    (folder / "adapter_config.json").write_text(json.dumps(sorted(arrays)))
    data = b"".join(arrays[name].tobytes() for name in sorted(arrays))
    (folder / "adapter_model.bytes").write_bytes(data)


def config(**changes: object) -> TrainConfig:
    """Returns the settings of the tiny run; its parts come flat."""
    names = {field.name for field in dataclasses.fields(OptimizerConfig)}
    optimizer = {"learning_rate": 1e-2, "warmup_steps": 2.0, "weight_decay": 0.01}
    optimizer |= {name: value for name, value in changes.items() if name in names}
    shown = {field.name for field in dataclasses.fields(ReportConfig)}
    report = {name: value for name, value in changes.items() if name in shown}
    plain = {n: v for n, v in changes.items() if n not in names | shown}
    return TrainConfig(
        **{
            "dtype": "float32",
            "remat": "none",
            "max_steps": 8,
            "logging_steps": 3,
            "eval_steps": 4,
            "save_steps": 2,
            "save_total_limit": 2,
            "lora": LoRAConfig(lora_dropout=0.2),
            "quant": QuantConfig(load_in_4bit=False),
            "optimizer": OptimizerConfig(**optimizer),
            "report": ReportConfig(**report),
        }
        | plain
    )


def train(
    output_dir: Path,
    *,
    console: Console | None = None,
    job: dict | None = None,
    **changes: object,
) -> TrainResult:
    """Runs the tiny job, with some settings and some arguments changed."""
    graphdef, trainable, frozen = split()
    settings = config(**{"fallback_dir": f"{output_dir}-rescue"} | changes)
    arguments = {
        "config": settings,
        "remat": RematPlan(policies=(settings.remat,)),
        "graphdef": graphdef,
        "trainable": trainable,
        "frozen": frozen,
        "train_loader": TinyLoader(),
        "eval_loader": TinyLoader(seed=9, micro_batches=1, steps_per_epoch=2),
        "output_dir": output_dir,
        "write_adapter": write_adapter,
    } | (job or {})
    with Path(os.devnull).open("w") as silence:
        return run(Job(**arguments), console or Console(file=silence))


def train_in_process(output: str, environment: dict[str, str], cache: str) -> None:
    """What a process to kill does."""
    os.environ.update(environment)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    train(Path(output))


if __name__ == "killable":
    train_in_process(**globals()["settings"])
