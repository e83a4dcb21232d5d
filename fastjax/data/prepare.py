"""From a configuration to the documents of a run: training and evaluation."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastjax.config import DataConfig
from fastjax.data.builtin_templates import BUILTIN_TEMPLATES
from fastjax.data.chat_template import (
    ChatTemplate,
    fitting_templates,
    get_chat_template,
)
from fastjax.data.embedded import embedded_announcement, embedded_examples
from fastjax.data.examples import Conversation, Example
from fastjax.data.files import eval_files
from fastjax.data.rendering import ResponseMarkers
from fastjax.data.report import DataReport
from fastjax.data.sources import ExampleSet, Source, load_examples
from fastjax.data.tokenization import Document, ExampleTokenizer
from fastjax.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainingData:
    """Documents of a run and what a user should know of them.

    Attributes:
      evaluation: Empty when nothing is held out or named.
      packing: Whether documents share rows.
      notes: One sentence each, beside those of the reports.
    """

    train: list[Document]
    evaluation: list[Document]
    train_report: DataReport
    eval_report: DataReport | None
    data_format: str
    packing: bool
    notes: tuple[str, ...]


def load_data(
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    seed: int,
    vocab_size: int | None = None,
    train_source: Source | None = None,
    eval_source: Source | None = None,
    markers: ResponseMarkers | None = None,
) -> TrainingData:
    """Reads, checks and tokenises the data of a run.

    Args:
      config: What to read and how.
      tokenizer: Is given the chat template that the run uses, so that it is saved.
      seed: Chooses the rows that are held out.
      vocab_size: Rows of the embedding.
      train_source: Rows in memory, in place of `config.dataset_name`.
      eval_source: Rows in memory, in place of `config.eval_dataset_name`.
      markers: Choose the trained characters instead of `config.train_on`.

    Raises:
      ConfigError: The fields of `config` do not suit the data.
      DataError: The data cannot be used; says where and why.
    """
    named = train_source if train_source is not None else config.dataset_name
    train = _embedded() if named is None else _loaded(config, named, "train")
    held = _evaluation(config, eval_source, named)
    examples = train.examples
    if held is None and config.val_set_size:
        examples, held = held_out(examples, float(config.val_set_size), seed=seed)
    notes = list(train.notes)
    everything = [*examples, *(held or [])]
    template = None
    if any(isinstance(example, Conversation) for example in everything):
        template = _template(config, tokenizer, may_choose=named is None, notes=notes)
    make = ExampleTokenizer(
        tokenizer,
        max_length=config.max_length,
        train_on=config.train_on,
        overlong=config.overlong,
        vocab_size=vocab_size,
        template=template,
        markers=markers,
    )
    documents, report = make.tokenize(examples)
    evaluation, eval_report = make.tokenize(held) if held else ([], None)
    shared = _shared(documents, evaluation)
    if shared:
        notes.append(f"{shared} evaluation rows are training rows too")
    packing = config.packing
    return TrainingData(
        train=documents,
        evaluation=evaluation,
        train_report=report,
        eval_report=eval_report,
        data_format=train.data_format,
        packing=train.data_format == "text" if packing is None else packing,
        notes=tuple(notes),
    )


def held_out(
    examples: list[Example], size: float, *, seed: int
) -> tuple[list[Example], list[Example]]:
    """Returns the examples without the held-out ones, and those, both in order.

    Args:
      examples: What is split.
      size: A count, or a share below 1.
      seed: Chooses them.

    Raises:
      ConfigError: Nothing would be left to train.
    """
    count = round(size) if size >= 1 else max(1, round(size * len(examples)))
    if count >= len(examples):
        raise ConfigError(
            f"val_set_size={size:g} leaves nothing of {len(examples)} rows to train"
        )
    draws = np.random.PCG64(np.random.SeedSequence([seed])).random_raw(len(examples))
    chosen = set(np.argsort(draws, kind="stable")[:count].tolist())
    kept = [example for i, example in enumerate(examples) if i not in chosen]
    return kept, [examples[i] for i in sorted(chosen)]


def _embedded() -> ExampleSet:
    return ExampleSet(
        examples=list(embedded_examples("train")),
        data_format="messages",
        notes=(embedded_announcement(),),
    )


def _evaluation(
    config: DataConfig, eval_source: Source | None, named: Source | None
) -> list[Example] | None:
    """Returns the evaluation examples that are named or lie beside the training."""
    if eval_source is not None:
        return _loaded(config, eval_source, config.dataset_test_split).examples
    asked = config.eval_dataset_name
    place = asked or named
    split = config.dataset_test_split
    files = eval_files(place, split=split) if isinstance(place, str | Path) else []
    if files or asked is not None:
        return _loaded(config, files or asked or "", split).examples
    return list(embedded_examples("validation")) if named is None else None


def _loaded(config: DataConfig, source: Source, split: str) -> ExampleSet:
    return load_examples(
        source,
        split=config.dataset_train_split if split == "train" else split,
        data_format=config.data_format,
        text_field=config.dataset_text_field,
        column_map=config.column_map,
        skip_bad_rows=config.skip_bad_rows,
    )


def _template(
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    may_choose: bool,
    notes: list[str],
) -> ChatTemplate:
    """Returns the template of the run and leaves it with the tokenizer.

    Args:
      may_choose: The embedded data may take a built-in template where there is none.
    """
    path = config.chat_template_path
    if path is None and not tokenizer.chat_template and may_choose:
        path = fitting_templates(tokenizer)[0]
        notes.append(
            f"the tokenizer has no chat template: using {path!r} "
            "(--chat_template_path chooses)"
        )
    if path in BUILTIN_TEMPLATES:
        get_chat_template(tokenizer, path)
    template = ChatTemplate(tokenizer, path=path)
    if path is not None:
        tokenizer.chat_template = template.source
    return template


def _shared(train: list[Document], evaluation: list[Document]) -> int:
    seen = {document.input_ids.tobytes() for document in train} if evaluation else set()
    return sum(document.input_ids.tobytes() in seen for document in evaluation)
