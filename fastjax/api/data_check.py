"""What a run would train on, shown before any weight is read."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fastjax.api.context import context_fault
from fastjax.api.loaders import data_loader, data_seed
from fastjax.api.loading import load_text_side
from fastjax.config import TrainConfig
from fastjax.data import DataReport, Document, TrainingData, load_data
from fastjax.errors import printable
from fastjax.terminal import as_html

_BAR_CELLS = 40
_SAMPLE_TOKENS = 1500
_TRAINED_STYLE = "bold green"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Neighbouring tokens of the sample that are all trained, or all only read.

    Attributes:
      first_id: Token at its beginning.
      last_id: Token at its end.
    """

    text: str
    is_trained: bool
    first_id: int
    last_id: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DataCheck:
    """What the data of a run holds; prints itself with rich.

    Attributes:
      sample: The first row of the training set.
      sample_end: What its last token is, in words.
      fill: Share of the positions of an epoch that hold a token.
      steps_per_epoch: With the batch size and packing of the settings.
    """

    data_format: str
    packing: bool
    train: DataReport
    evaluation: DataReport | None
    notes: tuple[str, ...]
    sample: tuple[Piece, ...]
    sample_end: str
    fill: float
    steps_per_epoch: int

    def as_json(self) -> dict[str, Any]:
        """Returns all of it, as JSON holds it."""
        return {
            "data_format": self.data_format,
            "packing": self.packing,
            "steps_per_epoch": self.steps_per_epoch,
            "fill": self.fill,
            "train": self.train.as_json(),
            "evaluation": self.evaluation and self.evaluation.as_json(),
            "notes": list(self.notes),
            "sample": [dataclasses.asdict(piece) for piece in self.sample],
            "sample_end": self.sample_end,
        }

    def __rich__(self) -> RenderableType:
        """Returns tables of counts and lengths, the notes and the sample."""
        parts: list[RenderableType] = [self._counts(), _lengths(self.train)]
        notes = [*self.notes, *self.train.notes]
        parts += [Text(f"note: {note}") for note in notes]
        title = Text("first row; what is trained is ")
        title.append("green and in brackets", style=_TRAINED_STYLE)
        return Group(*parts, Text(), title, self._shown_sample(), Text(self.sample_end))

    def _repr_html_(self) -> str:
        """Returns the same for notebooks."""
        return as_html(self)

    def _counts(self) -> Table:
        table = Table(show_header=self.evaluation is not None, box=None)
        table.add_column("")
        table.add_column("training", justify="right")
        reports = [self.train]
        if self.evaluation is not None:
            table.add_column("evaluation", justify="right")
            reports.append(self.evaluation)
        uncut = max(r.uncut for r in reports)
        rows = {
            "documents": [f"{r.rows:,}" for r in reports],
            "tokens": [f"{r.tokens:,}" for r in reports],
            "trained": [f"{r.trained_share:.1%}" for r in reports],
            f"longest row{uncut}": [f"{r.length_max:,}" for r in reports],
            f"95 % of rows{uncut} up to": [f"{r.length_95:,}" for r in reports],
        }
        left_out = [{what: count for count, what in r.left_out} for r in reports]
        for what in dict.fromkeys(what for counts in left_out for what in counts):
            rows[what] = [f"{counts.get(what, 0):,}" for counts in left_out]
        rows["format"] = [self.data_format]
        packed = "packed" if self.packing else "not packed"
        rows["steps of an epoch"] = [f"{self.steps_per_epoch:,}"]
        rows[f"positions filled, {packed}"] = [f"{self.fill:.1%}"]
        for name, values in rows.items():
            table.add_row(name, *values)
        return table

    def _shown_sample(self) -> Text:
        # Brackets, so that what is trained shows without colour too.
        text = Text()
        for piece in self.sample:
            if piece.is_trained:
                text.append("[", style="dim")
                text.append(piece.text, style=_TRAINED_STYLE)
                text.append("]", style="dim")
            else:
                text.append(piece.text)
        return text


def check_data(config: TrainConfig) -> DataCheck:
    """Reads and tokenises the data of a configuration and tells what it holds.

    Needs the tokenizer and the configuration of the model, neither weights nor a GPU.

    Raises:
      FastJaxError: The data cannot be used, or the model has no tokenizer; says why.
    """
    tokenizer, sizes = load_text_side(config)
    data = load_data(
        config.data,
        tokenizer,
        seed=data_seed(config),
        vocab_size=sizes.vocab_size,
    )
    found = data_check(config, data, tokenizer)
    fault = context_fault(sizes, data)
    if fault is None:
        return found
    return dataclasses.replace(
        found, notes=(*found.notes, f"{fault.what}; {fault.fix}")
    )


def data_check(config: TrainConfig, data: TrainingData, tokenizer: Any) -> DataCheck:
    """Returns what tokenised data holds, as `check_data` does."""
    loader = data_loader(config, data, data.train, for_training=True)
    document = data.train[0]
    return DataCheck(
        data_format=data.data_format,
        packing=data.packing,
        train=data.train_report,
        evaluation=data.eval_report,
        notes=data.notes,
        sample=tuple(_pieces(document, tokenizer)),
        sample_end=_end(document, tokenizer),
        fill=loader.fill,
        steps_per_epoch=loader.steps_per_epoch,
    )


def _pieces(document: Document, tokenizer: Any) -> Iterator[Piece]:
    pairs = zip(document.input_ids.tolist(), document.trained.tolist(), strict=True)
    shown = itertools.islice(pairs, _SAMPLE_TOKENS)
    for is_trained, run in itertools.groupby(shown, key=lambda pair: pair[1]):
        ids = [token for token, _ in run]
        text = tokenizer.decode(ids)
        yield Piece(text=text, is_trained=is_trained, first_id=ids[0], last_id=ids[-1])


def _end(document: Document, tokenizer: Any) -> str:
    last = int(document.input_ids[-1])
    token = printable(tokenizer.convert_ids_to_tokens(last), 40)
    ends = " (end of text)" if last == tokenizer.eos_token_id else ""
    trained = "trained" if document.trained[-1] else "not trained"
    cut = len(document) > _SAMPLE_TOKENS
    shown = f"; {_SAMPLE_TOKENS:,} tokens of {len(document):,} shown" if cut else ""
    return f"the last token is {token} {last}{ends}, {trained}{shown}"


def _lengths(report: DataReport) -> Table:
    title = f"rows by length in tokens{report.uncut}"
    table = Table(title=title, title_justify="left", box=None)
    table.add_column("up to", justify="right")
    table.add_column("rows", justify="right")
    table.add_column("")
    most = max(count for _, count in report.histogram)
    for length, count in report.histogram:
        cells = -(-_BAR_CELLS * count // most)
        table.add_row(f"{length:,}", f"{count:,}", "█" * cells)
    return table
