"""Turns rows of columns into examples, in one of seven formats."""

import dataclasses
import difflib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from fastjax.config import DataFormat
from fastjax.data.bad_rows import BadRows
from fastjax.data.conversation import (
    RowFault,
    conversation,
    says_nothing,
    sharegpt_messages,
    string,
)
from fastjax.data.examples import Completion, Example, Segments, Text, Tokens
from fastjax.data.rows import Row
from fastjax.errors import ConfigError, DataError, printable

_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that "
    "provides further context. Write a response that appropriately completes the "
    "request."
)
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that "
    "appropriately completes the request."
)
# Columns that are prompts and completions under other names.
_PROMPTS = ("question", "query", "input", "instruction", "problem")
_ANSWERS = ("answer", "response", "output", "target", "solution")
# Columns of formats that other tools read and this one does not.
_FOREIGN = {
    "chosen": "preference pairs, which supervised fine-tuning does not use",
    "rejected": "preference pairs, which supervised fine-tuning does not use",
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """Columns of a format and how a row of them becomes an example.

    Attributes:
      read: None of a row that says nothing: the trained column is null or empty.
    """

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    read: Callable[[Row], Example | None]


class ExampleReader:
    """Reads rows of one format: that of a text field, or detected from the first row.

    Attributes:
      format: None before the first row.
      empty_rows: Rows that said nothing and were left out.
      notes: What a user should know about the columns.
    """

    def __init__(
        self,
        data_format: DataFormat = "auto",
        *,
        text_field: str | None = None,
        column_map: tuple[str, ...] = (),
    ) -> None:
        known = formats(text_field or "text")
        if data_format == "auto" and text_field is not None:
            data_format = "text"
        self.format = None if data_format == "auto" else known[data_format]
        self.empty_rows = 0
        self.notes: list[str] = []
        self._known = known
        self._text_field = text_field
        self._renames = parsed_column_map(column_map)
        self._is_first = True

    def read(self, rows: Iterable[Row], bad_rows: BadRows) -> Iterator[Example]:
        """Yields the examples of `rows`.

        Raises:
          DataError: The format is unknown, or a row breaks it and `bad_rows` is spent.
        """
        for row in rows:
            bad_rows.look_at_next()
            renamed = row._replace(columns=self._renamed(row))
            if self._is_first:
                self._start(renamed)
            try:
                example = self._example(renamed)
            except RowFault as fault:
                bad_rows.refuse(str(fault), row.where)
                continue
            if example is None:
                self.empty_rows += 1
            else:
                yield example

    def _example(self, row: Row) -> Example | None:
        assert self.format is not None
        lacking = [name for name in self.format.required if name not in row.columns]
        if lacking:
            raise RowFault(
                f"the row lacks {_listed(lacking)}, which the format "
                f"{self.format.name} needs; it has {_listed(row.columns)}"
            )
        return self.format.read(row)

    def _start(self, row: Row) -> None:
        self._is_first = False
        if self._text_field is not None and self._text_field not in row.columns:
            raise ConfigError(
                f"dataset_text_field={self._text_field!r} is no column",
                where=row.where,
                fix=f"the columns are {_listed(row.columns)}; left out, they choose "
                "the format",
            )
        fitting = [f for f in self._known.values() if set(f.required) <= set(row[0])]
        if self.format is None:
            if not fitting:
                raise _unknown_format(row, self._known.values())
            self.format = fitting[0]
            others = ", ".join(other.name for other in fitting[1:])
            if others:
                self.notes.append(
                    f"read as {self.format.name}; the columns would also fit {others} "
                    "(--data_format chooses)"
                )
        used = {*self.format.required, *self.format.optional}
        extra = [name for name in row.columns if name not in used]
        if extra and self.format in fitting:
            self.notes.append(f"columns not used: {_listed(extra)}")

    def _renamed(self, row: Row) -> dict[str, object]:
        if not self._renames:
            return row.columns
        for old, new in self._renames.items():
            if self._is_first and old not in row.columns:
                close = difflib.get_close_matches(old, row.columns, n=1, cutoff=0.0)
                near = f"; nearest: {printable(close[0], 40)}" if close else ""
                raise ConfigError(
                    f"column_map renames {old!r}, which is no column",
                    where=row.where,
                    fix=f"the columns are {_listed(row.columns)}{near}",
                )
            if self._is_first and new in row.columns and new not in self._renames:
                raise ConfigError(
                    f"column_map renames {old!r} to {new!r}, which exists already",
                    where=row.where,
                    fix=f"rename that one too: {new}=other_{new}",
                )
        return {self._renames.get(name, name): v for name, v in row.columns.items()}


def formats(text_field: str = "text") -> dict[str, Format]:
    """Returns the formats by name, in the order in which they are tried."""
    known = (
        Format(
            name="messages",
            required=("messages",),
            optional=("tools",),
            read=_read_messages,
        ),
        Format(
            name="prompt_completion",
            required=("prompt", "completion"),
            optional=("tools",),
            read=_read_completion,
        ),
        Format(
            name="sharegpt",
            required=("conversations",),
            optional=("system", "tools"),
            read=_read_sharegpt,
        ),
        Format(
            name="tokens",
            required=("input_ids",),
            optional=("labels", "attention_mask"),
            read=_read_tokens,
        ),
        Format(name="segments", required=("segments",), read=_read_segments),
        Format(
            name="text",
            required=(text_field,),
            read=lambda row: _read_text(row, text_field),
        ),
        Format(
            name="alpaca",
            required=("instruction", "output"),
            optional=("input", "system", "history"),
            read=_read_alpaca,
        ),
    )
    return {entry.name: entry for entry in known}


def parsed_column_map(entries: tuple[str, ...]) -> dict[str, str]:
    """Returns old name -> new name of "old=new" entries."""
    renames: dict[str, str] = {}
    for entry in (part for text in entries for part in text.split(",")):
        old, sign, new = (part.strip() for part in entry.partition("="))
        if not (old and sign and new):
            raise ConfigError(f"column_map={entry!r} must be old=new: question=prompt")
        renames[old] = new
    return renames


def alpaca_prompt(
    instruction: str,
    context: str = "",
    system: str = "",
    *,
    history: Sequence[tuple[str, str]] = (),
) -> str:
    """Returns the prompt of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca).

    Args:
      instruction: What is asked.
      context: The input that comes with it.
      system: Replaces the preamble.
      history: Earlier questions and answers, which come between.
    """
    preamble = system or (_ALPACA_WITH_INPUT if context else _ALPACA)
    turns = [
        f"### Instruction:\n{question}\n\n### Response:\n{answer}"
        for question, answer in history
    ]
    middle = f"\n\n### Input:\n{context}" if context else ""
    last = f"### Instruction:\n{instruction}{middle}\n\n### Response:\n"
    return "\n\n".join([preamble, *turns, last])


def _read_text(row: Row, field: str) -> Text | None:
    text = _optional_string(row.columns, field)
    if not text.strip():
        return None
    return Text(text=text, where=row.where, is_start=row.is_start, is_end=row.is_end)


def _read_completion(row: Row) -> Example | None:
    prompt, completion = row.columns["prompt"], row.columns["completion"]
    if prompt is None or completion is None:
        return None
    if isinstance(prompt, str) or isinstance(completion, str):
        before, after = string(prompt, "prompt"), string(completion, "completion")
        where = row.where
        example = Completion(prompt=before, completion=after, where=where)
        return example if after.strip() else None
    chat = conversation(
        completion, row.columns.get("tools"), prompt=prompt, where=row.where
    )
    return None if says_nothing(chat) else chat


def _read_messages(row: Row) -> Example | None:
    messages = row.columns["messages"]
    if messages is None:
        return None
    chat = conversation(messages, row.columns.get("tools"), where=row.where)
    return None if says_nothing(chat) else chat


def _read_sharegpt(row: Row) -> Example | None:
    turns = row.columns["conversations"]
    if turns is None:
        return None
    messages = sharegpt_messages(turns, row.columns.get("system"))
    chat = conversation(messages, row.columns.get("tools"), where=row.where)
    return None if says_nothing(chat) else chat


def _read_alpaca(row: Row) -> Completion | None:
    names = ("instruction", "input", "output", "system")
    columns = {name: _optional_string(row.columns, name) for name in names}
    if not columns["output"].strip() or not columns["instruction"].strip():
        return None
    prompt = alpaca_prompt(
        columns["instruction"],
        columns["input"],
        columns["system"],
        history=_history(row.columns.get("history")),
    )
    return Completion(prompt=prompt, completion=columns["output"], where=row.where)


def _history(value: object) -> list[tuple[str, str]]:
    pairs = [] if value is None else _list(value, "history")
    turns = []
    for i, pair in enumerate(pairs):
        texts = _list(pair, f"history[{i}]")
        if len(texts) != 2:
            raise RowFault(f"history[{i}] must be a question and its answer")
        turns.append(tuple(string(text, f"history[{i}]") for text in texts))
    return turns


def _read_segments(row: Row) -> Segments | None:
    pieces = []
    for i, piece in enumerate(_list(row.columns["segments"] or [], "segments")):
        field = f"segments[{i}]"
        if not isinstance(piece, Mapping) or not isinstance(piece.get("label"), bool):
            raise RowFault(f"{field} must be an object of label (true, false) and text")
        pieces.append((string(piece.get("text"), f"{field}.text"), piece["label"]))
    has_trained = any(text and label for text, label in pieces)
    return Segments(pieces=tuple(pieces), where=row.where) if has_trained else None


def _read_tokens(row: Row) -> Tokens | None:
    ids = _integers(row.columns["input_ids"] or [], "input_ids")
    labels, mask = row.columns.get("labels"), row.columns.get("attention_mask")
    wanted = ids if labels is None else _integers(labels, "labels")
    kept = [1] * len(ids) if mask is None else _integers(mask, "attention_mask")
    if not len(ids) == len(wanted) == len(kept):
        raise RowFault("input_ids, labels and attention_mask differ in length")
    pairs = [(i, w) for i, w, is_kept in zip(ids, wanted, kept, strict=True) if is_kept]
    wrong = next((w for i, w in pairs if w not in (i, -100)), None)
    if wrong is not None:
        raise RowFault(f"labels must be the token itself or -100, not {wrong}")
    if any(i < 0 for i, _ in pairs):
        raise RowFault("input_ids must not be negative")
    trained = tuple(w != -100 for _, w in pairs)
    row_ids = tuple(i for i, _ in pairs)
    return (
        Tokens(input_ids=row_ids, trained=trained, where=row.where) if pairs else None
    )


def _integers(value: object, field: str) -> list[int]:
    values = _list(value, field)
    for i, number in enumerate(values):
        if not isinstance(number, int) or isinstance(number, bool) or number >= 2**31:
            raise RowFault(f"{field}[{i}] must be a token id, not {printable(number)}")
    return values


def _list(value: object, field: str) -> list:
    if isinstance(value, list | tuple):
        return list(value)
    raise RowFault(f"{field} must be a list, not a {type(value).__name__}")


def _optional_string(columns: Mapping[str, object], field: str) -> str:
    value = columns.get(field)
    return "" if value is None else string(value, field)


def _renaming(columns: Collection[str]) -> str:
    """Returns the flag that renames columns, whole where two speak for themselves."""
    prompt = next((name for name in _PROMPTS if name in columns), "old")
    answer = next((name for name in _ANSWERS if name in columns), None)
    if prompt == "old" or answer is None:
        return "rename columns with --column_map old=new"
    return f"rename columns with --column_map {prompt}=prompt,{answer}=completion"


def _unknown_format(row: Row, known: Iterable[Format]) -> DataError:
    columns = list(row.columns)

    def likeness(entry: Format) -> float:
        scores = [
            max(
                (difflib.SequenceMatcher(None, n, c).ratio() for c in columns),
                default=0,
            )
            for n in entry.required
        ]
        return -sum(scores) / len(scores)

    nearest = sorted(known, key=likeness)[:3]
    needs = "; ".join(f"{f.name} ({', '.join(f.required)})" for f in nearest)
    foreign = [_FOREIGN[name] for name in columns if name in _FOREIGN]
    looks = f"; they look like {foreign[0]}" if foreign else ""
    return DataError(
        f"no known format has the columns {_listed(columns)}{looks}",
        where=row.where,
        fix=f"nearest formats: {needs}; {_renaming(columns)}",
        code="FJ-DATA-FORMAT",
    )


def _listed(names: Iterable[str]) -> str:
    shown = [printable(name, 40) for name in names]
    more = f" and {len(shown) - 12} more" if len(shown) > 12 else ""
    return (", ".join(shown[:12]) or "none") + more
