"""Several adapters in one process, over one frozen base that is loaded once.

Adapters of equal shapes train together, by `vmap` over one step: they share the base
weights, the program and the batches, and differ in their values, learning rates, seeds
and scalings. Others come one group after another. Kernels take one adapter, so a sweep
computes by XLA.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from fastjax import files, nvidia, runtime
from fastjax import lora as adapters
from fastjax.api.context import note_context
from fastjax.api.device_faults import device_faults
from fastjax.api.language_model import LanguageModel
from fastjax.api.loaders import data_seed, eval_loader, train_loader
from fastjax.api.loading import load_model, load_text_side
from fastjax.api.memory import Planner, limit_here, memory_limit, planned_base_spec
from fastjax.api.run_folder import default_output_dir, require_writable
from fastjax.api.serving import serving_notes
from fastjax.api.sweep_group import SweepGroup
from fastjax.api.sweep_plan import SweepRun, sweep_runs, trained_together
from fastjax.api.sweep_result import RESULT_FILE, SweepEntry, SweepResult
from fastjax.api.training import require_possible
from fastjax.config import Implementations, TrainConfig
from fastjax.data import Loader, TrainingData, load_data
from fastjax.errors import ConfigError, Interrupted
from fastjax.models.build import DecoderSpec
from fastjax.terminal import open_console, say
from fastjax.train import record
from fastjax.train.compiled import MEMORY_FIX
from fastjax.train.lock import output_lock
from fastjax.train.publish import RUN_FILE, is_published


def run_sweep(
    config: TrainConfig,
    changes: Sequence[Mapping[str, Any]],
    *,
    notes: Sequence[str] = (),
) -> SweepResult:
    """Trains an adapter for each of the changes; returns them all, the best first.

    Each has a folder in `config.output_dir`, as `run_training` leaves it, without
    checkpoints. Called again, it trains only what is not finished yet.

    Args:
      config: What the adapters share; `data_seed` orders the rows of all of them.
      changes: Fields of the adapter, `learning_rate` or `seed`, and their values;
        `grid` makes all combinations.
      notes: Sentences to show first.

    Raises:
      FastJaxError: A change is impossible, or a run cannot start or go on; says why.
    """
    runtime.configure(
        full_determinism=config.full_determinism,
        memory_share=nvidia.memory_share(config.memory_gib),
    )
    nvidia.require_gpu_in_use()
    console = open_console()
    note = functools.partial(say, console)
    for text in notes:
        note(text)
    folder = Path(config.output_dir or default_output_dir(config))
    runs = sweep_runs(_by_xla(config), changes, folder)
    require_writable(folder, console)
    tokenizer, sizes = load_text_side(config)
    data = load_data(
        config.data, tokenizer, seed=data_seed(config), vocab_size=sizes.vocab_size
    )
    require_possible(config, data)
    note_context(sizes, config, data, note=note)
    served = [text for run in runs for text in serving_notes(run.config.lora)]
    for line in (
        *dict.fromkeys(served),
        *data.notes,
        f"training data: {data.train_report}",
    ):
        note(line)
    loader = train_loader(config, data)
    for _, planner in _groups(planned_base_spec(config, sizes), runs, loader):
        planner.require_fit(limit_here(planner.config))
    files.make_folder(folder)
    with output_lock(folder, note):
        left = [run for run in runs if not _is_finished(run, loader)]
        if left:
            note(f"{len(left)} of {len(runs)} adapters to train")
            model = _base_model(config)
            model.tokenizer = tokenizer
            for group in _batches_of_runs(model, left, loader):
                _train_together(model, group, data, loader, console)
        result = SweepResult.of([SweepEntry.read(run) for run in runs])
        files.write_atomic(folder / RESULT_FILE, files.dump_json(result.as_json()))
    return result


def _train_together(
    model: LanguageModel,
    runs: Sequence[SweepRun],
    data: TrainingData,
    loader: Loader,
    console: Console,
) -> None:
    config = runs[0].config
    planner = Planner.of(config, adapters.adapted_spec(model.spec, config.lora))
    group = SweepGroup(
        model,
        runs,
        loaders=(loader, eval_loader(config, data)),
        remat=planner.remat(planner.policy),
        console=console,
    )
    try:
        with device_faults("train", memory_fix=MEMORY_FIX):
            group.train()
            group.publish()
    except KeyboardInterrupt:
        names = ", ".join(run.name for run in runs)
        raise Interrupted(
            f"stopped at step {group.step} of {names}",
            where=str(runs[0].folder.parent),
            fix="the same command trains what is not finished, these from the start",
        ) from None
    finally:
        group.close()


def _base_model(config: TrainConfig) -> LanguageModel:
    model = load_model(
        config.model,
        revision=config.model_revision,
        dtype=config.dtype,
        quant=config.quant,
        implementations=_by_xla(config).implementations,
        max_seq_length=config.reach,
        rope_scaling=config.rope_scaling,
    )
    if model.lora is not None:
        raise ConfigError(
            "a sweep starts from a base model, and this is an adapter",
            where=config.model,
            fix=f"--model {model.source.name}",
        )
    return model


def _batches_of_runs(
    model: LanguageModel, runs: Sequence[SweepRun], loader: Loader
) -> list[Sequence[SweepRun]]:
    """Returns runs of equal shapes, as many at once as the memory holds.

    Raises:
      OutOfMemory: Not even one of some shape fits.
    """
    batches: list[Sequence[SweepRun]] = []
    for group, planner in _groups(model.spec, runs, loader):
        limit = memory_limit(planner.config)
        planner.require_fit(limit)
        many = 1
        while many < len(group) and (
            limit is None or _need(planner, many + 1) <= limit
        ):
            many += 1
        batches += itertools.batched(group, many)
    return batches


def _groups(
    spec: DecoderSpec, runs: Sequence[SweepRun], loader: Loader
) -> list[tuple[list[SweepRun], Planner]]:
    """Returns runs of equal shapes, with the planner of one of them.

    Args:
      spec: Structure of the base model.
      runs: In any order.
      loader: Of their batches.
    """
    groups = []
    for group in trained_together(spec, runs):
        config = group[0].config
        adapted = adapters.adapted_spec(spec, config.lora)
        planner = Planner.of(
            config,
            adapted,
            tokens=loader.row_length,
            documents=loader.max_segments,
        )
        groups.append((group, planner))
    return groups


def _need(planner: Planner, many: int) -> int:
    """Returns the bytes of a step of so many adapters at once."""
    model = planner.model
    own = model.trained + model.optimizer + model.gradients
    return planner.plan(rows=many * planner.shape.rows).peak + (many - 1) * own


def _is_finished(run: SweepRun, loader: Loader) -> bool:
    """Returns whether an earlier sweep left the result of this very run.

    Raises:
      ConfigError: It is the result of other settings or data.
    """
    if not is_published(run.folder):
        return False
    before = files.read_json(run.folder / RUN_FILE)
    now = {"settings": record.settings(run.config), "data": loader.fingerprint}
    if any(before.get(name) != value for name, value in now.items()):
        raise ConfigError(
            "the folder holds an adapter of other settings or data",
            where=str(run.folder),
            fix="give another output_dir, or delete that folder",
            code="FJ-CONFIG-RESUME",
        )
    return True


def _by_xla(config: TrainConfig) -> TrainConfig:
    """Returns the settings with XLA for every op that names no implementation."""
    named = dataclasses.asdict(config.implementations)
    chosen = Implementations(**{op: name or "xla" for op, name in named.items()})
    return dataclasses.replace(config, implementations=chosen)
