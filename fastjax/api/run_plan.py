"""What a run settles before any weight is read: its batches, its memory, its remat."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from rich.text import Text

from conversions.hf import read_config
from conversions.peft import grown_config, read_lora
from fastjax import runtime
from fastjax.api.context import note_context, require_context
from fastjax.api.loaders import data_seed, in_steps, train_loader
from fastjax.api.loading import find_files, load_text_side
from fastjax.api.memory import Planner, limit_here, memory_limit, planned_spec
from fastjax.api.remat_auto import compiled_memory, planned_remat
from fastjax.api.step_cache import StepCache
from fastjax.config import TrainConfig
from fastjax.data import Loader, TrainingData, load_data
from fastjax.data.report import counted
from fastjax.files import binary_size
from fastjax.models.build import DecoderSpec, abstract_decoder
from fastjax.models.registry import PRESETS
from fastjax.models.transformer_config import TransformerConfig
from fastjax.remat import RematPlan
from fastjax.terminal import as_html
from fastjax.train import Job
from fastjax.train.ahead import StepsAhead, settings_of
from fastjax.train.job import steps_of_run


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRun:
    """What is settled.

    Attributes:
      loader: Of the training batches.
      remat: What the backward pass recomputes, layer by layer.
      steps_ahead: Compiles the first step meanwhile; None where nothing does.
    """

    loader: Loader
    remat: RematPlan
    steps_ahead: StepsAhead | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryReport:
    """What a run will need, for people; prints itself with rich."""

    lines: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(self.lines)

    def __rich__(self) -> Text:
        """Returns the lines."""
        return Text(str(self))

    def _repr_html_(self) -> str:
        """Returns the same for notebooks."""
        return as_html(self)


def plan_run(config: TrainConfig) -> MemoryReport:
    """Returns what `plan_lines` yields.

    Raises:
      FastJaxError: The model is not found, or the run cannot fit; says what would.
    """
    return MemoryReport(tuple(plan_lines(config)))


def planned_run(
    config: TrainConfig,
    data: TrainingData,
    *,
    note: Callable[[str], None],
    spec: DecoderSpec | None = None,
    sizes: TransformerConfig | None = None,
) -> PlannedRun:
    """Returns the plan of a run that fits.

    Args:
      config: Of the run.
      data: Its rows decide how long a batch is.
      note: Is told what is going on.
      spec: Structure of the model.
      sizes: Of the model, when no structure is known yet.

    Raises:
      OutOfMemory: The run cannot fit; says what would.
      ConfigError: A document is longer than the model's context.
    """
    if spec is None:
        assert sizes is not None
        config = _with_lora_of(find_files(config).adapter, config, sizes)
        spec = planned_spec(config, sizes)
    note_context(spec.config, config, data, note=note)
    loader = train_loader(config, data)
    planner = Planner.of(
        config, spec, tokens=loader.row_length, documents=loader.max_segments
    )
    planner.require_fit(limit_here(config))
    remat, _ = planned_remat(planner, steps=_steps(config, loader), note=note)
    return PlannedRun(loader=loader, remat=remat)


def compiling_ahead(
    planned: PlannedRun,
    config: TrainConfig,
    sizes: TransformerConfig,
    note: Callable[[str], None],
) -> PlannedRun:
    """Returns the plan with its step being compiled, to read the weights meanwhile.

    On a GPU alone: elsewhere the compiler would take the processor from the reader. Not
    where an adapter's own settings, or measured ranks, will decide about the step.
    """
    if not _compiles_beside() or config.lora.auto_rank:
        return planned
    if find_files(config).adapter is not None:
        return planned
    spec = planned_spec(config, sizes)
    graphdef, trainable, frozen = nnx.split(abstract_decoder(spec), nnx.Param, ...)
    job = Job(
        config=in_steps(config, planned.loader.steps_per_epoch),
        graphdef=graphdef,
        trainable=trainable,
        frozen=frozen,
        train_loader=planned.loader,
        output_dir=Path(),
        remat=planned.remat,
        head_is_trainable=spec.trains_head,
    )
    described = {"structure": spec, **settings_of(job)}
    kept = StepCache(runtime.cache_folder() / "steps", described)
    return dataclasses.replace(planned, steps_ahead=StepsAhead(job, note, kept=kept))


def _compiles_beside() -> bool:
    return jax.default_backend() == "gpu"


def plan_lines(config: TrainConfig) -> Iterator[str]:
    """Yields what a run will need, for people; reads no weight.

    The data decides how long rows are where it is named; else they are taken to be
    `max_length` long. On a GPU the step is compiled on shapes and
    its memory is the compiler's; elsewhere the closed formula's, which a measured peak
    meets within 10 %.

    Raises:
      FastJaxError: The model is not found, or the run cannot fit; says what would.
    """
    runtime.configure()
    config, sizes = _settled(config)
    spec = planned_spec(config, sizes)
    loader = None if config.data.dataset_name is None else _loader(config)
    tokens = None if loader is None else loader.row_length
    documents = 1 if loader is None else loader.max_segments
    if loader is not None:
        yield (
            f"data: {loader.rows:,} rows of {tokens:,} tokens at most, "
            f"{counted(loader.steps_per_epoch, 'steps an epoch')}"
        )
    planner = Planner.of(config, spec, tokens=tokens, documents=documents)
    limit = memory_limit(config)
    yield from planner.lines(limit)
    planner.require_fit(limit)
    if jax.default_backend() == "gpu":
        notes: list[str] = []
        steps = 0 if loader is None else _steps(config, loader)
        remat, _ = planned_remat(planner, steps=steps, note=notes.append)
        yield from notes
        memory = compiled_memory(planner, remat)
        if memory is not None:
            yield f"compiled: {binary_size(memory.total_bytes)} on the device"
            if limit is not None and memory.total_bytes > limit:
                planner.refuse(limit, need=memory.total_bytes)


def _steps(config: TrainConfig, loader: Loader) -> int:
    """Returns the steps of a run for each shape, counted as those of its longest rows.

    Each length of rows is compiled once, and steps of shorter ones take less time.
    """
    lengths = loader.step_lengths
    share = float(lengths.mean()) / loader.row_length / len(np.unique(lengths))
    return int(steps_of_run(config, loader.steps_per_epoch) * share)


def _loader(config: TrainConfig) -> Loader:
    """Returns the training batches of the named data."""
    tokenizer, sizes = load_text_side(config)
    data = load_data(
        config.data, tokenizer, seed=data_seed(config), vocab_size=sizes.vocab_size
    )
    require_context(sizes, data)
    return train_loader(config, data)


def _settled(config: TrainConfig) -> tuple[TrainConfig, TransformerConfig]:
    """Returns the settings with an adapter's own kind, and the sizes of the model.

    A preset's are as it is listed, those of others as their files say.
    """
    found = PRESETS.get(config.model.lower())
    if found is not None and not Path(config.model).is_dir():
        sizes = found.config
    else:
        files = find_files(config)
        sizes = read_config(files.folder)
        if files.adapter is not None:
            sizes = grown_config(files.adapter, sizes)
        config = _with_lora_of(files.adapter, config, sizes)
    return config, sizes.stretched(config.rope_scaling, config.reach)


def _with_lora_of(
    adapter: Path | None, config: TrainConfig, sizes: TransformerConfig
) -> TrainConfig:
    """Returns the settings with the kind that the adapter keeps when it trains on."""
    if adapter is None:
        return config
    return dataclasses.replace(config, lora=read_lora(adapter, sizes))
