"""From a configuration to the documents of a run: training and evaluation."""

import dataclasses
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastjax import runtime
from fastjax.config import DataConfig
from fastjax.data import document_cache
from fastjax.data.bad_rows import BadRows
from fastjax.data.document_cache import DocumentCache, cache_key
from fastjax.data.documents import Documents, DocumentWriter
from fastjax.data.embedded import embedded_announcement, embedded_examples
from fastjax.data.files import eval_files
from fastjax.data.hub import is_hub_name
from fastjax.data.rendering import ResponseMarkers
from fastjax.data.report import DataReport, data_report
from fastjax.data.run_template import RunTemplate
from fastjax.data.selection import held_out, shared_documents, weighted
from fastjax.data.sources import ExampleStream, ReadOptions, Source, source_files
from fastjax.data.tokenization import ExampleTokenizer
from fastjax.errors import ConfigError
from fastjax.files import user_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainingData:
    """Documents of a run and what a user should know of them.

    Attributes:
      evaluation: Empty when nothing is held out or named.
      packing: Whether documents share rows.
      uses_template: Whether rows were put into the chat template.
      notes: One sentence each, beside those of the reports.
    """

    train: Documents
    evaluation: Documents
    train_report: DataReport
    eval_report: DataReport | None
    data_format: str
    packing: bool
    uses_template: bool
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Prepared:
    """Documents of one or several sources.

    Attributes:
      data_formats: Of each source.
    """

    documents: Documents
    report: DataReport
    data_formats: tuple[str, ...]
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
    sources = _sources(config, train_source)
    template = RunTemplate(
        tokenizer, config.chat_template_path, may_choose=sources is None
    )
    read = _Reader(config, tokenizer, template, vocab_size, markers)
    train = read.embedded("train") if sources is None else read(sources, "train")
    held = _evaluation(config, read, eval_source, sources)
    documents, evaluation = train.documents, Documents.of([])
    report, eval_report = train.report, None
    if held is not None:
        evaluation, eval_report = held.documents, held.report
    elif config.val_set_size:
        documents, evaluation = held_out(
            documents, float(config.val_set_size), seed=seed
        )
        eval_report = _report_of(evaluation, config)
        report = _of_rest(report, documents)
    notes = [*train.notes, *template.notes]
    if shared := shared_documents(documents, evaluation):
        notes.append(_of_shared(shared))
    if config.dataset_weights:
        documents = weighted(documents, config.dataset_weights, seed=seed)
        notes.append(f"an epoch has {len(documents):,} rows, weighted by source")
    is_text = set(train.data_formats) == {"text"}
    return TrainingData(
        train=documents,
        evaluation=evaluation,
        train_report=report,
        eval_report=eval_report,
        data_format=", ".join(dict.fromkeys(train.data_formats)),
        packing=is_text if config.packing is None else config.packing,
        uses_template=template.is_used,
        notes=tuple(notes),
    )


def _of_shared(count: int) -> str:
    """Returns the note on evaluation rows that are trained."""
    if count == 1:
        return "1 evaluation row is a training row too"
    return f"{count} evaluation rows are training rows too"


def _of_rest(report: DataReport, documents: Documents) -> DataReport:
    """Returns the report of what is left when some documents are held out."""
    return dataclasses.replace(
        report,
        rows=len(documents),
        tokens=documents.tokens,
        trained_tokens=documents.trained_tokens,
    )


class _Reader:
    """Reads and tokenises sources by the settings of a run."""

    def __init__(
        self,
        config: DataConfig,
        tokenizer: "PreTrainedTokenizerBase",
        template: RunTemplate,
        vocab_size: int | None,
        markers: ResponseMarkers | None,
    ) -> None:
        self._config, self._tokenizer, self._template = config, tokenizer, template
        self._vocab_size, self._markers = vocab_size, markers

    def __call__(self, sources: Sequence[Source], split: str) -> _Prepared:
        """Returns the documents of sources, from the cache if they are there."""
        options = self._options(split)
        key = self._cache_key(sources, options)
        cache = DocumentCache(runtime.cache_folder() / "data")
        if key is None and not self._is_from_hub(sources):
            return self._tokenised(sources, options, DocumentWriter())
        if key is None:
            # On the disk while the run lasts: a set may be larger than the memory.
            with cache.new_writer() as writer:
                return self._tokenised(sources, options, writer)
        if kept := cache.get(key):
            return self._restored(kept)
        with cache.new_writer() as writer:
            prepared = self._tokenised(sources, options, writer)
            facts = {
                "report": dataclasses.asdict(prepared.report),
                "data_formats": prepared.data_formats,
                "notes": prepared.notes,
                "uses_template": self._template.is_used,
            }
            entry = document_cache.Entry(prepared.documents, facts)
            cache.put(key, writer, entry)
        return prepared

    def embedded(self, split: str) -> _Prepared:
        """Returns the documents of the data set that every machine has."""
        is_train = split == "train"
        examples = embedded_examples("train" if is_train else "validation")
        documents, report = self._example_tokenizer().tokenize(examples)
        notes = (embedded_announcement(),) if is_train else ()
        return _Prepared(
            documents=documents, report=report, data_formats=("messages",), notes=notes
        )

    def _tokenised(
        self, sources: Sequence[Source], options: ReadOptions, writer: DocumentWriter
    ) -> _Prepared:
        bad_rows = BadRows(self._config.skip_bad_rows, lists_all=True)
        streams = [ExampleStream(source, options, bad_rows) for source in sources]
        documents, report = self._example_tokenizer().tokenize(
            *streams, bad_rows=bad_rows, writer=writer
        )
        notes = [note for stream in streams for note in stream.notes]
        return _Prepared(
            documents=documents,
            report=report,
            data_formats=tuple(stream.data_format for stream in streams),
            notes=(*notes, *bad_rows.notes),
        )

    def _restored(self, entry: document_cache.Entry) -> _Prepared:
        """Returns what an entry holds, which this very code has written."""
        facts, report = entry.facts, entry.facts["report"]
        histogram = tuple((length, count) for length, count in report["histogram"])
        report |= {"histogram": histogram, "notes": tuple(report["notes"])}
        if facts["uses_template"]:
            self._template()
        return _Prepared(
            documents=entry.documents,
            report=DataReport(**report),
            data_formats=tuple(facts["data_formats"]),
            notes=(*facts["notes"], "tokenised data was kept from an earlier run"),
        )

    def _is_from_hub(self, sources: Sequence[Source]) -> bool:
        names = [source for source in sources if isinstance(source, str)]
        return self._config.use_dataset_cache and any(map(is_hub_name, names))

    def _example_tokenizer(self) -> ExampleTokenizer:
        config = self._config
        return ExampleTokenizer(
            self._tokenizer,
            max_length=config.max_length,
            train_on=config.train_on,
            overlong=config.overlong,
            special_tokens=config.special_tokens_in_text,
            vocab_size=self._vocab_size,
            template=self._template,
            markers=self._markers,
        )

    def _options(self, split: str) -> ReadOptions:
        config = self._config
        return ReadOptions(
            split=config.dataset_train_split if split == "train" else split,
            data_format=config.data_format,
            text_field=config.dataset_text_field,
            column_map=config.column_map,
            most_rows=config.max_train_samples if split == "train" else 0,
        )

    def _cache_key(self, sources: Sequence[Source], options: ReadOptions) -> str | None:
        """Returns the name of the documents in the cache; None if they are not kept."""
        found = [source_files(source, split=options.split) for source in sources]
        files = [path for paths in found for path in paths or ()]
        size = sum(path.stat().st_size for path in files)
        if (
            None in found
            or size < document_cache.MIN_FILE_BYTES
            or not self._config.use_dataset_cache
        ):
            return None
        config = self._config
        tokenizer: Any = self._tokenizer  # Fast, so that it has a backend.
        made_by = {
            "files": [len(paths or ()) for paths in found],
            "kinds": [path.name.split(".")[1:] for path in files],
            "options": dataclasses.asdict(options) | {"split": ""},
            "max_length": config.max_length,
            "train_on": config.train_on,
            "overlong": config.overlong,
            "skip_bad_rows": config.skip_bad_rows,
            "special_tokens_in_text": config.special_tokens_in_text,
            "vocab_size": self._vocab_size,
            "markers": None
            if self._markers is None
            else dataclasses.asdict(self._markers),
            "tokenizer": tokenizer.backend_tokenizer.to_str(),
            "special_tokens": {
                k: str(v) for k, v in tokenizer.special_tokens_map.items()
            },
            "template": self._template.text,
        }
        return cache_key(files, made_by)


def _sources(config: DataConfig, given: Source | None) -> list[Source] | None:
    """Returns the training sources; None stands for the embedded set."""
    if given is not None:
        sources: list[Source] = [given]
    elif config.dataset_name is None:
        return None
    else:
        sources = list(named_sources(config.dataset_name))
    weights = len(config.dataset_weights)
    if weights and weights != len(sources):
        raise ConfigError(
            f"dataset_weights has {weights} entries for {len(sources)} sources",
            fix="give a weight for each: --dataset_name a,b --dataset_weights 2,1",
        )
    return sources


def named_sources(name: str) -> list[str]:
    """Returns the names between commas; a file may have commas in its own."""
    if os.path.exists(user_path(name)):
        return [name]
    return [part.strip() for part in name.split(",") if part.strip()]


def _evaluation(
    config: DataConfig,
    read: _Reader,
    given: Source | None,
    trained: Sequence[Source] | None,
) -> _Prepared | None:
    """Returns the evaluation documents that are named or lie beside the training."""
    split = config.dataset_test_split
    if given is not None:
        return read([given], split)
    asked = config.eval_dataset_name
    places = trained if asked is None else named_sources(asked)
    if places is None:
        return read.embedded("validation")
    files = [
        file
        for place in places
        if isinstance(place, str | Path)
        for file in eval_files(place, split=split)
    ]
    if files:
        return read([files], split)
    return None if asked is None else read(places, split)


def _report_of(documents: Documents, config: DataConfig) -> DataReport:
    lengths = Counter(documents.lengths.tolist())
    return data_report(documents, lengths, max_length=config.max_length)
