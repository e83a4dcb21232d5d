"""`SFTTrainer`: supervised fine-tuning of a `LanguageModel` on rows in memory."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.console import Console

from fastjax.api.arguments import TrainingArguments
from fastjax.api.context import require_context, settled_scaling
from fastjax.api.device_faults import device_faults
from fastjax.api.foreign_arguments import no_method
from fastjax.api.language_model import LanguageModel
from fastjax.api.loaders import evaluation_loader
from fastjax.api.run_folder import default_output_dir
from fastjax.api.tokenizer import Tokenizer
from fastjax.api.trainer_results import (
    PredictionOutput,
    TokenRows,
    TrainerState,
    TrainOutput,
    numbers,
)
from fastjax.api.training import evaluate_model, prepare_data, train
from fastjax.config import TrainConfig
from fastjax.data import ResponseMarkers, Source, TrainingData
from fastjax.data.frame_rows import frame_rows, is_frame
from fastjax.errors import ConfigError
from fastjax.train import TrainResult
from kernels.cross_entropy import token_log_probs

_PADDING_COLLATORS = (
    "DataCollatorForSeq2Seq",
    "DataCollatorForLanguageModeling",
    "DataCollatorWithPadding",
    "DefaultDataCollator",
)


class SFTTrainer:
    """Trains a model on text, prompt-completion, messages or alpaca rows.

    Attributes:
      model: Trained in place.
      config: Settings, with what the model itself decides.
      data: The tokenised documents.
      result: Of the last `train`, with step times and compiled memory.
      state: Of the last `train`: log_history, global_step, epoch.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        train_dataset: Source,
        eval_dataset: Source | None = None,
        args: TrainingArguments | None = None,
        tokenizer: Any = None,
        processing_class: Any = None,
        data_collator: Any = None,
        formatting_func: Callable[[Mapping[str, Any]], str] | None = None,
        dataset_text_field: str | None = None,
        max_seq_length: int | None = None,
        packing: bool | None = None,
        dataset_num_proc: int | None = None,
        callbacks: Sequence[Any] | None = None,
    ) -> None:
        """Reads, checks and tokenises the rows.

        Args:
          model: From `FastLanguageModel`, with adapters or for full fine-tuning.
          train_dataset: File, folder, list of dicts, `datasets.Dataset` or DataFrame.
          eval_dataset: Rows to evaluate on.
          args: Settings.
          tokenizer: Replaces the model's.
          processing_class: The newer name of `tokenizer`.
          data_collator: One that only pads has no effect: batches are padded here.
          formatting_func: Makes the text of a row.
          dataset_text_field: Column of plain texts, read whatever others there are.
          max_seq_length: Longest row in tokens.
          packing: Several documents share a row, isolated from each other.
          dataset_num_proc: Has no effect: one process tokenises fast enough.
          callbacks: Must be empty; `metrics.jsonl` can be followed while a run goes on.

        Raises:
          ConfigError: Settings contradict each other or the model.
          DataError: The rows cannot be used; says where and why.
        """
        del dataset_num_proc
        if callbacks:
            raise ConfigError("callbacks are not supported", fix="leave them out")
        _require_padding_only(data_collator)
        self.model = model
        self.args = args or TrainingArguments()
        _take_tokenizer(model, tokenizer or processing_class)
        data_fields = {
            "dataset_text_field": dataset_text_field,
            "max_length": max_seq_length,
            "packing": packing,
        }
        self.config = _resolved(self.args, model, data_fields)
        if formatting_func is not None:
            field = self.config.data.dataset_text_field or "text"
            train_dataset = _formatted(train_dataset, formatting_func, field)
            if eval_dataset is not None:
                eval_dataset = _formatted(eval_dataset, formatting_func, field)
        self._sources = (train_dataset, eval_dataset)
        self._markers: ResponseMarkers | None = None
        self.result: TrainResult | None = None
        self.state = TrainerState()
        self.data = self._prepared()

    @property
    def train_dataset(self) -> TokenRows:
        """The rows as they are trained, before packing."""
        return TokenRows(self.data.train)

    @property
    def eval_dataset(self) -> TokenRows | None:
        """The rows that are evaluated; None without any."""
        return TokenRows(self.data.evaluation) if self.data.evaluation else None

    @property
    def processing_class(self) -> Tokenizer:
        """The tokenizer of the rows."""
        return Tokenizer(self.model.tokenizer)

    def train(self, resume_from_checkpoint: bool | str | None = None) -> TrainOutput:
        """Trains and returns the metrics, train_runtime among them.

        Args:
          resume_from_checkpoint: True continues the newest whole checkpoint of the
            output folder, a path that one; None starts anew.
        """
        modes = {"None": "no", "False": "no", "True": "auto"}
        asked = str(resume_from_checkpoint)
        config = dataclasses.replace(
            self.config, resume_from_checkpoint=modes.get(asked, asked)
        )
        console = Console(stderr=True)
        for note in self.args.notes:
            console.print(note, markup=False, soft_wrap=True)
        result = train(
            self.model,
            config,
            self.data,
            console=console,
            resume_command="trainer.train(resume_from_checkpoint=True)",
        )
        self.result = result
        folder = Path(config.output_dir or default_output_dir(config))
        self.state = TrainerState.of(result, folder)
        metrics = numbers(result.metrics)
        return TrainOutput(result.step, metrics["train_loss"], metrics)

    def save_model(self, output_dir: str | Path | None = None) -> Path:
        """Writes the adapter, or the whole model, and the tokenizer into a folder.

        Args:
          output_dir: None takes that of the settings.
        """
        folder = Path(output_dir or self.config.output_dir or "outputs")
        self.model.save_pretrained(folder)
        self.model.tokenizer.save_pretrained(folder)
        return folder

    def evaluate(self, eval_dataset: Source | None = None) -> dict[str, float | int]:
        """Returns loss, perplexity and runtime, and how many rows and trained tokens.

        Raises:
          ConfigError: There is nothing to evaluate on.
        """
        return evaluate_model(self.model, self.config, self._evaluation(eval_dataset))

    def predict(self, test_dataset: Source) -> PredictionOutput:
        """Returns the log-probability of every label, a row for each row of the set.

        Rows in which nothing carries loss are left out, as in training.
        """
        data = dataclasses.replace(self._evaluation(test_dataset), packing=False)
        require_context(self.model.config, data)
        loader = evaluation_loader(self.config, data)
        graphdef, state = nnx.split(self.model.for_inference())
        started = time.perf_counter()
        shape = (loader.rows, loader.row_length)
        predictions = np.zeros(shape, np.float32)
        label_ids = np.full(shape, -100, np.int32)
        fix = "lower per_device_eval_batch_size"
        with device_faults("predict", memory_fix=fix):
            for step in range(loader.steps_per_epoch):
                batch = {name: array[0] for name, array in loader.batch(step).items()}
                scores = np.asarray(_label_scores(graphdef, state, batch))
                rows, length = loader.rows_of(step), scores.shape[1]
                predictions[rows, :length] = scores[: len(rows)]
                label_ids[rows, :length] = batch["targets"][: len(rows)]
        loss = -float(predictions.sum() / max((label_ids >= 0).sum(), 1))
        metrics = {
            "test_loss": loss,
            "test_perplexity": float(np.exp(loss)),
            "test_runtime": time.perf_counter() - started,
        }
        return PredictionOutput(predictions, label_ids, metrics)

    def train_on_responses(self, markers: ResponseMarkers) -> None:
        """Trains only what follows the response marker in each row."""
        self.data = self._prepared(markers)
        self._markers = markers

    def _prepared(self, markers: ResponseMarkers | None = None) -> TrainingData:
        train_source, eval_source = self._sources
        return prepare_data(
            self.config,
            self.model,
            train_source=train_source,
            eval_source=eval_source,
            markers=markers,
        )

    def _evaluation(self, dataset: Source | None) -> TrainingData:
        if dataset is None and not self.data.evaluation:
            raise ConfigError(
                "there is no evaluation data",
                fix="give eval_dataset to SFTTrainer or to this call",
            )
        if dataset is None:
            return self.data
        whole = dataclasses.replace(self.config.data, val_set_size=0.0)
        config = dataclasses.replace(self.config, data=whole)
        return prepare_data(
            config, self.model, train_source=dataset, markers=self._markers
        )

    def __getattr__(self, name: str) -> Any:
        """Says what to call in place of what transformers' trainer has."""
        raise AttributeError(no_method("SFTTrainer", name))


def train_on_responses_only(
    trainer: SFTTrainer, *, instruction_part: str, response_part: str
) -> SFTTrainer:
    """Returns the trainer with loss on responses alone.

    Args:
      trainer: Changed in place; its rows are tokenised again.
      instruction_part: Text that begins each instruction, as the template prints it.
      response_part: Text that begins each response.

    Raises:
      DataError: No row holds the markers.
    """
    trainer.train_on_responses(
        ResponseMarkers(instruction_part=instruction_part, response_part=response_part)
    )
    return trainer


@functools.partial(jax.jit, static_argnums=0)
def _label_scores(
    graphdef: nnx.GraphDef, state: nnx.State, batch: dict[str, jax.Array]
) -> jax.Array:
    decoder = nnx.merge(graphdef, state)
    hidden_btd = decoder(
        batch["input_ids"],
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
    )
    hidden = hidden_btd.reshape(-1, hidden_btd.shape[-1])
    scores = token_log_probs(
        hidden,
        decoder.head_weight().astype(hidden.dtype),
        batch["targets"].reshape(-1),
        adapter=decoder.head_adapter(hidden),
        softcap=decoder.logit_softcap,
    )
    return scores.reshape(batch["targets"].shape)


def _resolved(
    args: TrainingArguments, model: LanguageModel, data_fields: Mapping[str, Any]
) -> TrainConfig:
    """Returns the settings with what the model itself decides."""
    if not model.spec.adapters and not model.spec.trains_weights:
        raise ConfigError(
            "the model has nothing to train",
            fix="call FastLanguageModel.get_peft_model(model, ...) first, or load it "
            "with full_finetuning=True",
        )
    config = args.config
    if config.data.new_tokens:
        raise ConfigError(
            "new_tokens has no effect here: the model is loaded already",
            fix="call add_new_tokens(model, tokenizer, [...]) before get_peft_model",
        )
    given = {name: value for name, value in data_fields.items() if value is not None}
    if "max_length" not in given and "max_length" not in args.given:
        reach, context = model.max_seq_length, model.config.context_tokens
        given["max_length"] = reach if model.stretch is None else min(reach, context)
    data = dataclasses.replace(config.data, **given)
    context_fields = settled_scaling(
        model, config, given=args.given, max_length=data.max_length
    )
    wants_remat = "remat" in args.given or model.remat is None
    if "dtype" in args.given and config.dtype != model.spec.compute_dtype:
        model.set_compute_dtype(config.dtype)
    return dataclasses.replace(
        config,
        model=model.source.name,
        model_revision=model.source.revision or config.model_revision,
        dtype=model.spec.compute_dtype,
        **context_fields,
        full_finetuning=model.spec.trains_weights,
        quant=dataclasses.replace(
            config.quant,
            load_in_4bit=model.spec.has_4bit,
            load_in_8bit=bool(model.spec.packed) and not model.spec.has_4bit,
        ),
        lora=model.lora or config.lora,
        remat=config.remat if wants_remat else model.remat,
        data=data,
        implementations=model.spec.implementations,
    )


def _require_padding_only(data_collator: Any) -> None:
    name = type(data_collator).__name__
    if data_collator is not None and name not in _PADDING_COLLATORS:
        raise ConfigError(
            f"data_collator={name} is not supported: its masks would be lost",
            fix="leave it out; train_on, or train_on_responses_only, chooses the "
            "trained tokens",
        )


def _take_tokenizer(model: LanguageModel, tokenizer: Any) -> None:
    if tokenizer is not None:
        is_ours = isinstance(tokenizer, Tokenizer)
        model.tokenizer = tokenizer.wrapped if is_ours else tokenizer


def _formatted(
    rows: Source, formatting_func: Callable[[Any], Any], field: str
) -> list[dict[str, str]]:
    if isinstance(rows, str | Path) or not isinstance(rows, Iterable):
        raise ConfigError(
            "formatting_func needs rows in memory",
            fix="load the file with datasets.load_dataset, or leave the function out",
        )
    rows = frame_rows(rows) if is_frame(rows) else rows
    texts = [formatting_func(row) for row in rows]
    wrong = next((text for text in texts if not isinstance(text, str)), None)
    if wrong is not None:
        raise ConfigError(
            "formatting_func must return the text of one row, not a "
            f"{type(wrong).__name__}",
            fix="for a function of many rows use dataset.map(function, batched=True)",
        )
    return [{field: text} for text in texts]
