"""Measures the gradient of each weight and gives adapters ranks by it."""

import collections
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from conversions.peft import plain_number, read_adapter_config
from fastjax import lora as adapters
from fastjax.api.language_model import LanguageModel
from fastjax.api.loading import add_adapter
from fastjax.config import LoRAConfig, TrainConfig
from fastjax.data import Loader
from fastjax.rank_allocation import allocated_ranks, probe_of
from fastjax.remat import Remat
from fastjax.target_modules import full_name
from fastjax.train import Job, resume
from fastjax.train.state import FIRST_SCALE
from fastjax.train.step import summed_gradients

_BATCHES = 4
_SIDES = ("lora_a", "lora_b")


def set_ranks(
    model: LanguageModel, config: TrainConfig, loader: Loader, remat: Remat | None
) -> str:
    """Gives the model fresh adapters with ranks by importance; says what they are.

    A run that goes on from a checkpoint takes the ranks that it started with.

    Args:
      model: Has adapters of even rank; new ones take their place.
      config: Of the run.
      loader: Of its training batches; the first few are measured.
      remat: What the backward pass recomputes.
    """
    wanted = model.lora
    assert wanted is not None
    held = _held_ranks(config)
    if held is None:
        ranks = _measured_ranks(model, wanted, config, loader, remat)
        lora = _with_ranks(wanted, ranks)
    else:
        lora = dataclasses.replace(
            wanted,
            lora_r=held.lora_r,
            lora_alpha=held.lora_alpha,
            rank_pattern=held.rank_pattern,
            alpha_pattern=held.alpha_pattern,
            auto_rank=False,
        )
    add_adapter(model, lora, seed=config.seed)
    spread = collections.Counter(a.rank for a in model.spec.adapters.values())
    parts = [f"{count} of {rank}" for rank, count in sorted(spread.items())]
    return f"ranks by importance: {', '.join(parts)}"


def _held_ranks(config: TrainConfig) -> LoRAConfig | None:
    """Returns the adapter of the checkpoint that the run goes on from."""
    if config.output_dir is None or not Path(config.output_dir).is_dir():
        return None
    folder = resume.chosen(Path(config.output_dir), config.resume_from_checkpoint)
    if folder is None or not (folder / "adapter_config.json").is_file():
        return None
    return read_adapter_config(folder).lora


def _measured_ranks(
    model: LanguageModel,
    lora: LoRAConfig,
    config: TrainConfig,
    loader: Loader,
    remat: Remat | None,
) -> dict[str, int]:
    """Returns a rank for each adapted module.

    The singular values of each gradient come from two passes over the batches, as a
    randomised decomposition (0909.4061 algorithm 5.1): an adapter `A B` with a random
    A and B = 0 has the gradient `A^T G` in B; with an orthonormal base of its rows as
    B, and A = 0, it has `G B^T` in A. The gradient of a weight itself is never made.
    """
    probe = probe_of(lora)
    add_adapter(model, probe, seed=config.seed)
    fresh = adapters.adapter_weights(model.decoder, model.spec)
    shapes = {name: array.shape for name, array in fresh.items()}
    del fresh
    modules = list(model.spec.adapters)
    key = jax.random.key(config.seed)
    spread = {
        f"{module}.lora_a": jax.random.normal(
            jax.random.fold_in(key, index), shapes[f"{module}.lora_a"]
        )
        for index, module in enumerate(modules)
    }
    spread |= {f"{m}.lora_b": jnp.zeros(shapes[f"{m}.lora_b"]) for m in modules}
    rows = _gradients(model, spread, config, loader, remat)
    turned = {f"{m}.lora_a": jnp.zeros(shapes[f"{m}.lora_a"]) for m in modules}
    for module in modules:
        found = rows[f"{module}.lora_b"]
        base = jnp.linalg.qr(found.T)[0].T
        # A matrix of fewer outputs than the probe's rank has fewer directions.
        missing = found.shape[0] - base.shape[0]
        turned[f"{module}.lora_b"] = jnp.pad(base, ((0, missing), (0, 0)))
    columns = _gradients(model, turned, config, loader, remat)
    values = {}
    for module in modules:
        found = np.linalg.svd(columns[f"{module}.lora_a"], compute_uv=False)
        values[module] = [float(value) for value in found]
    costs = {
        m: sum(math.prod(shapes[f"{m}.{side}"]) for side in _SIDES) // probe.lora_r
        for m in modules
    }
    return allocated_ranks(values, costs, rank=lora.lora_r)


def _gradients(
    model: LanguageModel,
    weights: Mapping[str, Array],
    config: TrainConfig,
    loader: Loader,
    remat: Remat | None,
) -> dict[str, Array]:
    """Returns the gradients of adapters that hold these weights, by canonical name."""
    adapters.set_adapter_weights(model.decoder, model.spec, weights)
    graphdef, trainable, frozen = model.split()
    job = Job(
        config=config,
        graphdef=graphdef,
        trainable=trainable,
        frozen=frozen,
        train_loader=loader,
        output_dir=Path(),
        head_is_trainable=model.spec.trains_head,
    )
    loss = job.loss_function(loader, remat)

    @jax.jit
    def step(trainable: PyTree, frozen: PyTree, batch: dict[str, Array]) -> PyTree:
        # The first steps' scale: no gradient of float16 overflows, few vanish.
        factor = jnp.float32(FIRST_SCALE / batch["input_ids"].size)
        return summed_gradients(loss, trainable, frozen, batch, factor=factor)[0]

    total: PyTree = None
    for index in range(min(_BATCHES, loader.steps_per_epoch)):
        batch = {k: jnp.asarray(v) for k, v in loader.batch(index).items()}
        found = step(trainable, frozen, batch)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    model.update(total)
    return adapters.adapter_weights(model.decoder, model.spec)


def _with_ranks(lora: LoRAConfig, ranks: Mapping[str, int]) -> LoRAConfig:
    """Returns the adapter's kind with these ranks, each product scaled as before."""
    ((most, _),) = collections.Counter(ranks.values()).most_common(1)

    def alpha(rank: int) -> float:
        ratio = rank / lora.lora_r
        return lora.lora_alpha * (math.sqrt(ratio) if lora.use_rslora else ratio)

    others = {full_name(m): r for m, r in ranks.items() if r != most}
    return dataclasses.replace(
        lora,
        lora_r=most,
        lora_alpha=alpha(most),
        rank_pattern=tuple(f"{name}={rank}" for name, rank in others.items()),
        alpha_pattern=tuple(
            f"{name}={plain_number(alpha(rank))}" for name, rank in others.items()
        ),
        auto_rank=False,
    )
