"""Runs: a configuration, a model and its data, from first step to written adapter."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

from flax import nnx
from rich.console import Console

from conversions.hf import folder_fingerprint
from fastjax import nvidia, requirements, runtime
from fastjax.api.context import require_context
from fastjax.api.device_faults import device_faults
from fastjax.api.hub import push_folder
from fastjax.api.language_model import LanguageModel
from fastjax.api.loaders import data_seed, eval_loader, evaluation_loader, in_steps
from fastjax.api.loading import add_adapter, find_files, load_model, load_text_side
from fastjax.api.model_card import write_model_card
from fastjax.api.ranks import set_ranks
from fastjax.api.reading_ahead import reading_ahead
from fastjax.api.result_writers import adapter_writer, model_writer
from fastjax.api.run_folder import default_output_dir, require_writable, write_settings
from fastjax.api.run_plan import PlannedRun, compiling_ahead, planned_run
from fastjax.api.samples import make_sampler, read_prompts
from fastjax.api.serving import serving_notes
from fastjax.api.vocabulary import add_new_tokens, require_trained_rows
from fastjax.config import LoRAConfig, TrainConfig
from fastjax.data import ResponseMarkers, Source, TrainingData, load_data
from fastjax.errors import ConfigError, ModelError
from fastjax.terminal import open_console, say
from fastjax.train import Job, TrainResult, evaluate, make_eval_step, resume, run
from fastjax.train.checkpoint import checkpoints
from fastjax.train.compiled import MEMORY_FIX
from fastjax.train.publish import MODEL_FOLDER
from fastjax.train.trackers import require_packages

_SAME = "the same command"


def run_training(
    config: TrainConfig,
    *,
    notes: Sequence[str] = (),
    resume_command: str = _SAME,
) -> TrainResult:
    """Trains as the command line does: model and data by name, results in a folder.

    `config.yaml` in that folder holds the settings, and runs again as it is.

    Args:
      config: Everything that the run depends on.
      notes: Sentences to show first.
      resume_command: Continues the run; shown when it is interrupted.

    Raises:
      FastJaxError: The run cannot start, go on or finish; says why.
    """
    config, folder, console = _begun(config, notes)
    note, settings = functools.partial(say, console), folder / "config.yaml"
    # Before the reader looks for it too, since that one does not tell what is missing.
    find_files(config)
    with reading_ahead(config):
        # Before any weight is loaded, so that a broken file shows in seconds.
        tokenizer, sizes = load_text_side(config)
        nvidia.require_gpu_in_use()
        say(console, "reading the data")
        vocab_size, seed = sizes.vocab_size, data_seed(config)
        data = load_data(config.data, tokenizer, seed=seed, vocab_size=vocab_size)
        plan = planned_run(config, data, sizes=sizes, note=note)
        planned = compiling_ahead(plan, config, sizes, note)
        # Beside a checkpoint they are its run's. Not later: the disk will be busy.
        is_new = not (folder.is_dir() and checkpoints(folder))
        if is_new or not settings.exists():
            write_settings(settings, config)
        say(console, f"loading {config.model}")
        model = load_for_training(config)
    model.tokenizer = tokenizer
    given, config = config, _with_adapter_of(model, config, console)
    if is_new and config != given:
        write_settings(settings, config)
    for note in () if config.full_finetuning else serving_notes(config.lora):
        say(console, note)
    result = train(
        model,
        config,
        data,
        console=console,
        resume_command=resume_command,
        planned=planned,
    )
    if not result.was_finished:
        write_settings(settings, config)
    _push(folder, config, console)
    _say_next(config, data, console)
    return result


def _begun(
    config: TrainConfig, notes: Sequence[str]
) -> tuple[TrainConfig, Path, Console]:
    """Starts the device; returns the settings with their folder, it, and a console."""
    runtime.configure(
        full_determinism=config.full_determinism,
        memory_share=nvidia.memory_share(config.memory_gib),
    )
    runtime.wake_device()
    console = open_console()
    for note in (*notes, *(fault.what for fault in requirements.faults())):
        say(console, note)
    folder = Path(config.output_dir or default_output_dir(config))
    config = dataclasses.replace(config, output_dir=str(folder))
    _require_all_it_needs(config, folder, console)
    return config, folder, console


def _push(folder: Path, config: TrainConfig, console: Console) -> None:
    report = config.report
    if report.push_to_hub and report.hub_model_id:
        address = push_folder(
            folder, report.hub_model_id, private=report.hub_private_repo
        )
        say(console, f"uploaded to {address}")


def load_for_training(config: TrainConfig) -> LanguageModel:
    """Returns the model of a configuration, with adapters unless all weights train."""
    model = _load(config, full_finetuning=config.full_finetuning)
    if config.data.new_tokens and model.lora is None:
        add_new_tokens(model, model.tokenizer, config.data.new_tokens)
    if not config.full_finetuning and model.lora is None:
        require_trained_rows(model, config.lora)
        add_adapter(model, config.lora, seed=config.seed)
    return model


def _load(config: TrainConfig, *, full_finetuning: bool) -> LanguageModel:
    return load_model(
        config.model,
        revision=config.model_revision,
        dtype=config.dtype,
        quant=config.quant,
        full_finetuning=full_finetuning,
        implementations=config.implementations,
        max_seq_length=config.reach,
        rope_scaling=config.rope_scaling,
    )


def prepare_data(
    config: TrainConfig,
    model: LanguageModel,
    *,
    train_source: Source | None = None,
    eval_source: Source | None = None,
    markers: ResponseMarkers | None = None,
) -> TrainingData:
    """Returns the documents of a run, read, checked and tokenised.

    Raises:
      ModelError: The model has no tokenizer.
      DataError: The data cannot be used; says where and why.
    """
    if model.tokenizer is None:
        raise ModelError(
            "the model folder has no tokenizer",
            where=str(model.source.folder),
            fix="copy tokenizer.json and tokenizer_config.json of the model there",
        )
    return load_data(
        config.data,
        model.tokenizer,
        seed=data_seed(config),
        vocab_size=model.config.vocab_size,
        train_source=train_source,
        eval_source=eval_source,
        markers=markers,
    )


def train(
    model: LanguageModel,
    config: TrainConfig,
    data: TrainingData,
    *,
    console: Console | None = None,
    resume_command: str = _SAME,
    planned: PlannedRun | None = None,
) -> TrainResult:
    """Trains the model in place and writes the result to `config.output_dir`.

    The newest weights are put back into the model however the run ends.

    Args:
      model: Its trainable variables are consumed and replaced.
      config: Everything else that the run depends on.
      data: From `prepare_data`.
      console: Takes notes and progress; None writes to the standard error.
      resume_command: Continues the run; shown when it is interrupted.
      planned: From `planned_run`; None plans now, beside the loaded model.

    Raises:
      ConfigError: Evaluation is asked for and there is nothing to evaluate on, or
        full determinism is asked for too late.
    """
    require_possible(config, data)
    console = console or open_console()
    _say_what_trains(model, config, data, console)
    folder = Path(config.output_dir or default_output_dir(config))
    if planned is None:
        note = functools.partial(say, console)
        planned = planned_run(config, data, spec=model.spec, note=note)
    config = _with_ranks(model, config, planned, console)
    graphdef, trainable, frozen = model.split()
    job = Job(
        config=in_steps(config, planned.loader.steps_per_epoch),
        graphdef=graphdef,
        trainable=trainable,
        frozen=frozen,
        train_loader=planned.loader,
        eval_loader=eval_loader(config, data),
        output_dir=folder,
        remat=planned.remat,
        write_adapter=adapter_writer(model),
        write_model=model_writer(model),
        on_exit=model.update,
        resume_command=resume_command,
        base=folder_fingerprint(model.source.folder),
        sampler=make_sampler(model, config.report),
        head_is_trainable=model.spec.trains_head,
        flops_per_token=_flops_per_token(model),
        steps_ahead=planned.steps_ahead and planned.steps_ahead.steps,
    )
    with device_faults("train", memory_fix=MEMORY_FIX):
        result = run(job, console)
    if not result.was_finished:
        place = folder / MODEL_FOLDER if model.spec.trains_weights else folder
        write_model_card(place, model, config, result, data=planned.loader.fingerprint)
    return result


def run_evaluation(config: TrainConfig) -> dict[str, float | int]:
    """Returns what `evaluate_model` does of a model or adapter folder."""
    runtime.configure(full_determinism=config.full_determinism)
    model = _load(config, full_finetuning=False)
    data = prepare_data(config, model)
    return evaluate_model(model, config, data)


def evaluate_model(
    model: LanguageModel, config: TrainConfig, data: TrainingData
) -> dict[str, float | int]:
    """Returns loss, perplexity and runtime, and how many rows and trained tokens.

    The held-out documents are measured, or all of them when none are held out.

    Raises:
      ConfigError: A document is longer than the model's context.
    """
    require_context(model.config, data)
    loader = evaluation_loader(config, data)
    graphdef, trainable, frozen = nnx.split(model.for_inference(), nnx.Param, ...)
    job = Job(
        config=config,
        graphdef=graphdef,
        trainable=trainable,
        frozen=frozen,
        train_loader=loader,
        output_dir=Path(),
    )
    step = make_eval_step(job.loss_function(loader, None))
    with device_faults("evaluate", memory_fix="lower per_device_eval_batch_size"):
        result = evaluate(step, trainable, frozen, loader)
    counts = {
        "eval_rows": len(data.evaluation or data.train),
        "eval_trained_tokens": result.num_tokens,
    }
    return {**result.metrics(), **counts}


def _with_ranks(
    model: LanguageModel, config: TrainConfig, planned: PlannedRun, console: Console
) -> TrainConfig:
    """Gives adapters the ranks that the first batches ask for, if those decide."""
    if model.lora is None or not model.lora.auto_rank:
        return config
    with device_faults("measure ranks", memory_fix=MEMORY_FIX):
        ranks = set_ranks(model, config, planned.loader, planned.remat)
    say(console, ranks)
    return dataclasses.replace(config, lora=model.lora)


def _with_adapter_of(
    model: LanguageModel, config: TrainConfig, console: Console
) -> TrainConfig:
    """Returns the settings with the kind of adapter that the model really has."""
    if model.lora is None or model.lora == config.lora:
        return config
    if config.lora != LoRAConfig():
        say(console, "the adapter keeps its own rank, targets and dropout")
    return dataclasses.replace(config, lora=model.lora)


def _say_what_trains(
    model: LanguageModel, config: TrainConfig, data: TrainingData, console: Console
) -> None:
    lines = [*data.notes, f"training data: {data.train_report}"]
    if data.eval_report is not None:
        lines.append(f"evaluation data: {data.eval_report}")
    lines.append(model.trainable_summary)
    for line in lines:
        say(console, line)


def _require_all_it_needs(config: TrainConfig, folder: Path, console: Console) -> None:
    """Finds out what is missing before anything heavy is loaded."""
    require_writable(folder, console)
    require_packages(config.report.report_to)
    _require_named_files(config)


def _require_named_files(config: TrainConfig) -> None:
    """Finds out before anything heavy is loaded whether files of the settings exist."""
    if config.report.sample_prompts is not None:
        read_prompts(Path(config.report.sample_prompts))
    if config.resume_from_checkpoint not in ("auto", "no"):
        resume.named(config.resume_from_checkpoint)


def require_possible(config: TrainConfig, data: TrainingData) -> None:
    """Raises `ConfigError` for what data and machine do not let a run do."""
    wants_evaluation = config.eval_strategy == "epoch" or config.eval_steps > 0
    report = config.report
    wants_best = report.load_best_model_at_end or report.early_stopping_patience > 0
    wants_evaluation = wants_evaluation and config.eval_strategy != "no"
    if (wants_evaluation or wants_best) and not data.evaluation:
        uses = config.uses_of_evaluation
        without = [f"leave out {', '.join(uses)}"] if uses else []
        if wants_evaluation:
            without.insert(0, "set eval_strategy to no")
        what = f"eval_strategy={config.eval_strategy}" if wants_evaluation else uses[0]
        raise ConfigError(
            f"{what} needs evaluation data",
            fix="give eval_dataset_name (SFTTrainer: eval_dataset) or val_set_size, "
            f"or {' and '.join(without)}",
        )
    share = nvidia.memory_share(config.memory_gib)
    if share is not None and not runtime.is_capped():
        raise ConfigError(
            "memory_gib was asked for after the device was first used",
            fix="give memory_gib to FastLanguageModel.from_pretrained too, or set "
            f"XLA_CLIENT_MEM_FRACTION={share:.4f} before",
        )
    if config.full_determinism and not runtime.is_deterministic():
        raise ConfigError(
            "full_determinism was asked for after the device was first used",
            fix="set XLA_FLAGS=--xla_gpu_exclude_nondeterministic_ops=true before",
        )


def _flops_per_token(model: LanguageModel) -> float:
    """Returns the products of a training step a token, without attention's scores.

    Two a weight forward, two for the gradient of its input, and two more for its own
    where it trains. The embedding is a look-up, unless it is the head as well.
    """
    config, count = model.config, model.num_parameters()
    if not config.tie_word_embeddings:
        count -= config.vocab_size * config.hidden_size
    return (6.0 if model.spec.trains_weights else 4.0) * count


def _say_next(config: TrainConfig, data: TrainingData, console: Console) -> None:
    folder = config.output_dir
    target = f"{folder}/{MODEL_FOLDER}" if config.full_finetuning else folder
    lines = [f"{'model' if config.full_finetuning else 'adapter'}: {target}"]
    as_trained = "" if data.uses_template else " --no-chat"
    lines.append(
        f"ask it:   fastjax generate --model {target}{as_trained} --prompt ..."
    )
    if not config.full_finetuning:
        lines.append(f"merge it: fastjax export --model {folder} --output_dir ...")
    for line in lines:
        say(console, line)
