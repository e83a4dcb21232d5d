"""Turns examples into token ids and a mask of the tokens that carry loss."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastjax.config import Overlong, SpecialTokens, TrainOn
from fastjax.data.bad_rows import BadRows
from fastjax.data.chat_template import ChatTemplate, control_tokens
from fastjax.data.documents import (
    SOURCE_SHIFT,
    Document,
    Documents,
    DocumentWriter,
)
from fastjax.data.examples import Conversation, Example, Text, Tokens
from fastjax.data.rendering import (
    RenderedExample,
    ResponseMarkers,
    Span,
    rendered_example,
)
from fastjax.data.report import DataReport, counted, data_report
from fastjax.errors import DataError, ModelError, printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROWS_A_CALL, _CHARACTERS_A_CALL = 1000, 1 << 18
_HAS_CONTROL_TOKENS = "the text holds control tokens, which are read as such"


class ExampleTokenizer:
    """Tokenises examples by one set of rules.

    Lengths alone decide what is padding, never the padding token. A whole text is
    tokenised at once and spans become tokens by character offsets: pieces tokenised
    one by one would join differently.

    Args:
      tokenizer: A fast one, which knows offsets.
      max_length: Tokens of a document.
      train_on: Tokens that carry loss.
      overlong: What happens to a longer document; None splits a `Text` and truncates
        anything else.
      special_tokens: What happens to messages that hold control tokens.
      vocab_size: Rows of the embedding; None does not check the ids.
      template: Makes the template of conversations when the first one comes; None
        takes the tokenizer's.
      markers: Choose the trained characters instead of `train_on`.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        max_length: int,
        train_on: TrainOn = "auto",
        overlong: Overlong | None = None,
        special_tokens: SpecialTokens = "keep",
        vocab_size: int | None = None,
        template: Callable[[], ChatTemplate] | None = None,
        markers: ResponseMarkers | None = None,
    ) -> None:
        if not tokenizer.is_fast:
            raise ModelError(
                "the tokenizer does not know character offsets",
                where=printable(tokenizer.name_or_path),
                fix="its folder needs a tokenizer.json",
            )
        self._tokenizer = tokenizer
        concrete: Any = tokenizer  # Fast ones have a backend.
        self._backend = concrete.backend_tokenizer
        self._max_length = max_length
        self._train_on: TrainOn = train_on
        self._overlong = overlong
        self._special_tokens: SpecialTokens = special_tokens
        self._vocab_size = vocab_size
        self._make_template = template or (lambda: ChatTemplate(tokenizer))
        self._template: ChatTemplate | None = None
        self._markers = markers
        # This call also ends any truncation and padding that its files ask for.
        self._bos = _added_bos(tokenizer)
        self._eos = _single_id(tokenizer.eos_token_id)
        self._control_tokens = control_tokens(tokenizer)

    def tokenize(
        self,
        *sources: Iterable[Example],
        bad_rows: BadRows | None = None,
        writer: DocumentWriter | None = None,
    ) -> tuple[Documents, DataReport]:
        """Returns the documents of the examples that have something to train.

        A few thousand examples are in memory at a time.

        Args:
          sources: What is tokenised; the number of a row tells which it is of.
          bad_rows: Counts the rows that the chat template refuses; None tolerates none.
          writer: Takes the documents; None keeps them in memory.

        Raises:
          DataError: No example has, an id is outside the embedding, or a document is
            too long while `overlong` is "error".
        """
        bad_rows = bad_rows or BadRows()
        refused_before = bad_rows.count
        writer = writer or DocumentWriter()
        counts: Counter[str] = Counter()
        notes: Counter[str] = Counter()
        lengths: Counter[int] = Counter()
        for row, example, whole, row_notes in self._numbered(sources, bad_rows):
            notes.update(row_notes)
            lengths[len(whole)] += 1
            for document in self._fitted(whole, example, counts):
                self._check_ids(document, example)
                writer.add(document, row)
        bad_rows.require_within_budget()
        documents = writer.close()
        if refused := bad_rows.count - refused_before:
            counts["refused"] = refused
        report = data_report(
            documents,
            lengths,
            max_length=self._max_length,
            counts=counts,
            notes=tuple(f"{note} ({count} rows)" for note, count in notes.items()),
        )
        if not documents:
            raise _nothing_trained(report, self._max_length, self._markers)
        return documents, report

    def _numbered(
        self, sources: Sequence[Iterable[Example]], bad_rows: BadRows
    ) -> Iterator[tuple[int, Example, Document, list[str]]]:
        for source, examples in enumerate(sources):
            first = source << SOURCE_SHIFT
            for row, encoded in enumerate(self._encoded(examples, bad_rows), first):
                yield row, *encoded

    def _encoded(
        self, examples: Iterable[Example], bad_rows: BadRows
    ) -> Iterator[tuple[Example, Document, list[str]]]:
        """Yields each usable example, its whole document and what to note of it."""
        rendered = ((e, self._rendered(e, bad_rows)) for e in examples)
        for pairs in _batches(rendered):
            if bad_rows.is_spent:  # What is left is read for its broken rows alone.
                continue
            texts = [entry.text for _, entry in pairs if entry is not None]
            # The tokenizer's own call makes Python lists of all that it knows.
            encodings = iter(
                self._backend.encode_batch(texts, add_special_tokens=False)
            )
            for example, entry in pairs:
                if isinstance(example, Tokens):
                    yield example, _given(example), []
                elif entry is not None:
                    document = self._document(entry, next(encodings))
                    yield example, document, self._notes(example, entry, document)

    def _rendered(self, example: Example, bad_rows: BadRows) -> RenderedExample | None:
        """Returns the text of an example; None of tokens, and of a refused row."""
        if isinstance(example, Tokens):
            return None
        if isinstance(example, Conversation) and self._template is None:
            self._template = self._make_template()
        try:
            if self._special_tokens == "error" and self._holds_control_tokens(example):
                raise DataError(
                    "a message holds control tokens",
                    where=example.where,
                    fix="remove them, or read them as such: --special_tokens_in_text "
                    "keep",
                    code="FJ-DATA-ROW",
                )
            return rendered_example(
                example,
                train_on=self._train_on,
                template=self._template,
                markers=self._markers,
            )
        except DataError as error:
            bad_rows.take(error)
            return None

    def _document(self, rendered: RenderedExample, encoding: Any) -> Document:
        ids: list[int] = encoding.ids
        if rendered.spans == ((0, len(rendered.text)),):
            trained = [True] * len(ids)
        else:
            trained = trained_tokens(encoding.offsets, rendered.spans)
        if rendered.begins and self._bos is not None and ids[:1] != [self._bos]:
            ids, trained = [self._bos, *ids], [False, *trained]
        if rendered.ends and self._eos is not None and ids[-1:] != [self._eos]:
            ids, trained = [*ids, self._eos], [*trained, rendered.trains_end]
        return Document(np.array(ids, np.int32), np.array(trained, np.bool_))

    def _fitted(
        self, whole: Document, example: Example, counts: Counter[str]
    ) -> list[Document]:
        """Returns what of a document is kept within the limit, and counts what not."""
        length, limit = len(whole), self._max_length
        policy = self._overlong or (
            "split" if isinstance(example, Text) else "truncate"
        )
        documents = [whole]
        if length > limit:
            if policy == "error":
                raise _overlong(length, limit, example.where)
            if policy == "drop":
                counts["dropped_overlong"] += 1
                return []
            documents = _pieces(whole, limit)
            documents = documents[:1] if policy == "truncate" else documents
        kept = [document for document in documents if document.trained_tokens]
        if not kept:
            counts["cut_to_nothing"] += length > limit and whole.trained_tokens > 0
            counts["dropped_untrained"] += 1
        elif length > limit:
            counts["split" if policy == "split" else "truncated"] += 1
        return kept

    def _notes(
        self, example: Example, rendered: RenderedExample, document: Document
    ) -> list[str]:
        notes = [rendered.note] if rendered.note else []
        ids = document.input_ids
        if rendered.is_chat:
            if self._bos is not None and len(ids) and ids[0] != self._bos:
                notes.append("the chat template begins without the BOS token")
            ends = np.flatnonzero(document.trained)
            last = int(ids[ends[-1]]) if len(ends) else self._eos
            if last != self._eos and last not in self._control_tokens:
                notes.append("no end-of-turn token is trained: the model may not stop")
        elif rendered.ends and self._eos is None:
            notes.append("the tokenizer has no EOS token: the model may not stop")
        if self._holds_control_tokens(example):
            notes.append(_HAS_CONTROL_TOKENS)
        return notes

    def _holds_control_tokens(self, example: Example) -> bool:
        """Tells whether a message brings control tokens; plain texts may."""
        if not isinstance(example, Conversation):
            return False
        text = "\n".join(str(message["content"]) for message in example.messages)
        return any(token in text for token in self._control_tokens.values())

    def _check_ids(self, document: Document, example: Example) -> None:
        largest = int(document.input_ids.max())
        if self._vocab_size is not None and largest >= self._vocab_size:
            token = self._tokenizer.convert_ids_to_tokens(largest)
            raise DataError(
                f"token {largest} ({printable(token, 40)}) is outside the embedding, "
                f"which has {self._vocab_size} rows",
                where=example.where,
                fix="use the tokenizer of this model",
                code="FJ-DATA-VOCABULARY",
            )


def _pieces(whole: Document, limit: int) -> list[Document]:
    """Returns a document in pieces.

    Each begins with the last token of the piece before: so every token but the first
    of all stays the target of another.
    """
    ends = range(limit, len(whole) + limit - 1, limit - 1)
    return [
        Document(whole.input_ids[end - limit : end], whole.trained[end - limit : end])
        for end in ends
    ]


def _overlong(length: int, limit: int, where: str) -> DataError:
    return DataError(
        f"a row of {length} tokens is longer than max_length={limit}",
        where=where,
        fix="raise --max_length, or set --overlong truncate, split or drop",
        code="FJ-DATA-OVERLONG",
    )


def _batches(
    rendered: Iterable[tuple[Example, RenderedExample | None]],
) -> Iterator[list[tuple[Example, RenderedExample | None]]]:
    """Yields lists that are neither long nor large."""
    batch, size = [], 0
    for example, entry in rendered:
        batch.append((example, entry))
        size += len(entry.text) if entry is not None else 0
        if len(batch) >= _ROWS_A_CALL or size >= _CHARACTERS_A_CALL:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def trained_tokens(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Returns the tokens that share a character with a span; both are in order."""
    trained = [False] * len(offsets)
    index = 0
    for start, end in spans:
        while index < len(offsets) and offsets[index][1] <= start:
            index += 1
        token = index
        while token < len(offsets) and offsets[token][0] < end:
            trained[token] = offsets[token][0] < offsets[token][1]
            token += 1
    return trained


def _given(example: Tokens) -> Document:
    ids, trained = np.array(example.input_ids, np.int32), np.array(example.trained)
    return Document(ids, trained.astype(np.bool_))


def _added_bos(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """Returns the BOS id when the tokenizer begins a text with it."""
    bos = _single_id(tokenizer.bos_token_id)
    added = tokenizer("").input_ids
    return bos if bos is not None and added[:1] == [bos] else None


def _single_id(token_id: object) -> int | None:
    return token_id if isinstance(token_id, int) else None


def _nothing_trained(
    report: DataReport, max_length: int, markers: ResponseMarkers | None
) -> DataError:
    reasons = []
    if report.cut_to_nothing:
        late = "rows are trained only after the first"
        reasons.append(
            f"{counted(report.cut_to_nothing, late)} max_length={max_length} tokens "
            f"(the longest has {report.length_max})"
        )
    if report.dropped_overlong:
        longer = f"rows are longer than {max_length}"
        reasons.append(counted(report.dropped_overlong, longer))
    others = report.dropped_untrained - report.cut_to_nothing
    fix = "raise --max_length, or check --chat_template_path and --train_on"
    if others:
        none = "rows have no answer, or the chat template marks none"
        if markers is not None:
            none = f"rows have nothing after {markers.response_part!r}"
            fix = "copy instruction_part and response_part from a row as it is rendered"
        reasons.append(counted(others, none))
    return DataError(
        f"no token of any row would be trained: {'; '.join(reasons) or 'no rows'}",
        fix=fix,
        code="FJ-DATA-MASKED",
    )
