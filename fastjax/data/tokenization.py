"""Turns examples into token ids and a mask of the tokens that carry loss."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Bool, Int32

from fastjax.config import TrainOn
from fastjax.data.chat_template import ChatTemplate, control_tokens
from fastjax.data.examples import Conversation, Example
from fastjax.data.rendering import (
    RenderedExample,
    ResponseMarkers,
    Span,
    rendered_example,
)
from fastjax.data.report import DataReport
from fastjax.errors import DataError, ModelError, printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Overlong = Literal["truncate", "drop", "error"]
_ROWS_A_CALL = 1000


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Document:
    """Tokens of one example.

    Attributes:
      trained: Tokens that carry loss, as targets of the token before them.
    """

    input_ids: Int32[np.ndarray, " T"]
    trained: Bool[np.ndarray, " T"]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def trained_tokens(self) -> int:
        """Targets of the document; its first token is nobody's target."""
        return int(np.count_nonzero(self.trained[1:]))


class ExampleTokenizer:
    """Tokenises examples by one set of rules.

    Lengths alone decide what is padding, never the padding token. A whole text is
    tokenised at once and spans become tokens by character offsets: pieces tokenised
    one by one would join differently.

    Args:
      tokenizer: A fast one, which knows offsets.
      max_length: Tokens of a document.
      train_on: Tokens that carry loss.
      overlong: What happens to a longer document.
      vocab_size: Rows of the embedding; None does not check the ids.
      template: For conversations; None makes one of the tokenizer when needed.
      markers: Choose the trained characters instead of `train_on`.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        max_length: int,
        train_on: TrainOn = "auto",
        overlong: Overlong = "truncate",
        vocab_size: int | None = None,
        template: ChatTemplate | None = None,
        markers: ResponseMarkers | None = None,
    ) -> None:
        if not tokenizer.is_fast:
            raise ModelError(
                "the tokenizer does not know character offsets",
                where=printable(tokenizer.name_or_path),
                fix="its folder needs a tokenizer.json",
            )
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._train_on: TrainOn = train_on
        self._overlong: Overlong = overlong
        self._vocab_size = vocab_size
        self._template = template
        self._markers = markers
        self._bos = _added_bos(tokenizer)
        self._eos = _single_id(tokenizer.eos_token_id)
        self._control_tokens = control_tokens(tokenizer)

    def tokenize(
        self, examples: Sequence[Example]
    ) -> tuple[list[Document], DataReport]:
        """Returns a document for each example that has something to train.

        Raises:
          DataError: No example has, an id is outside the embedding, or a document is
            too long while `overlong` is "error".
        """
        if self._template is None and any(
            isinstance(e, Conversation) for e in examples
        ):
            self._template = ChatTemplate(self._tokenizer)
        counts: Counter[str] = Counter()
        notes: Counter[str] = Counter()
        lengths: list[int] = []
        documents: list[Document] = []
        for example, rendered, document in self._encoded(examples):
            notes.update(self._notes(example, rendered, document))
            lengths.append(len(document))
            kept = self._fitted(document, example, counts)
            if kept is not None:
                self._check_ids(kept, example)
                documents.append(kept)
        report = _report(documents, lengths, counts, notes, self._max_length)
        if not documents:
            raise _nothing_trained(report, self._max_length)
        return documents, report

    def _encoded(
        self, examples: Sequence[Example]
    ) -> Iterator[tuple[Example, RenderedExample, Document]]:
        for batch in itertools.batched(examples, _ROWS_A_CALL):
            rendered = [
                rendered_example(
                    example,
                    train_on=self._train_on,
                    template=self._template,
                    markers=self._markers,
                )
                for example in batch
            ]
            encoding = self._tokenizer(
                [entry.text for entry in rendered],
                add_special_tokens=False,
                return_offsets_mapping=True,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
            rows = zip(
                batch,
                rendered,
                encoding["input_ids"],
                encoding["offset_mapping"],
                strict=True,
            )
            for example, entry, ids, offsets in rows:
                yield example, entry, self._document(entry, ids, offsets)

    def _document(
        self, rendered: RenderedExample, ids: list[int], offsets: list[Span]
    ) -> Document:
        trained = trained_tokens(offsets, rendered.spans)
        if not rendered.is_chat:
            if self._bos is not None and ids[:1] != [self._bos]:
                ids, trained = [self._bos, *ids], [False, *trained]
            if self._eos is not None and ids[-1:] != [self._eos]:
                ids, trained = [*ids, self._eos], [*trained, rendered.trains_end]
        return Document(np.array(ids, np.int32), np.array(trained, np.bool_))

    def _fitted(
        self, document: Document, example: Example, counts: Counter[str]
    ) -> Document | None:
        """Returns the document within the limit, or None and counts why not."""
        length, limit = len(document), self._max_length
        if length > limit:
            if self._overlong == "error":
                raise DataError(
                    f"a row of {length} tokens is longer than max_length={limit}",
                    where=example.where,
                    fix="raise --max_length, or set --overlong truncate or drop",
                    code="FJ-DATA-OVERLONG",
                )
            if self._overlong == "drop":
                counts["dropped_overlong"] += 1
                return None
            whole = document
            document = Document(whole.input_ids[:limit], whole.trained[:limit])
            if not document.trained_tokens:
                counts["cut_to_nothing"] += bool(whole.trained_tokens)
        if not document.trained_tokens:
            counts["dropped_untrained"] += 1
            return None
        counts["truncated"] += length > limit
        return document

    def _notes(
        self, example: Example, rendered: RenderedExample, document: Document
    ) -> Iterator[str]:
        if rendered.note:
            yield rendered.note
        if rendered.is_chat:
            ids = document.input_ids
            if self._bos is not None and len(ids) and ids[0] != self._bos:
                yield "the chat template begins without the BOS token"
            ends = np.flatnonzero(document.trained)
            last = int(ids[ends[-1]]) if len(ends) else self._eos
            if last != self._eos and last not in self._control_tokens:
                yield "no end-of-turn token is trained: the model may not stop"
        elif self._eos is None:
            yield "the tokenizer has no EOS token: the model may not stop"
        if _holds_any(example, self._control_tokens.values()):
            yield "the text holds control tokens, which are read as such"

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


def _holds_any(example: Example, tokens: Iterable[str]) -> bool:
    """Tells whether a message brings control tokens; plain texts may bring theirs."""
    if not isinstance(example, Conversation):
        return False
    text = "\n".join(str(message["content"]) for message in example.messages)
    return any(token in text for token in tokens)


def _added_bos(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """Returns the BOS id when the tokenizer begins a text with it."""
    bos = _single_id(tokenizer.bos_token_id)
    added = tokenizer("").input_ids
    return bos if bos is not None and added[:1] == [bos] else None


def _single_id(token_id: object) -> int | None:
    return token_id if isinstance(token_id, int) else None


def _report(
    documents: list[Document],
    lengths: list[int],
    counts: Counter[str],
    notes: Counter[str],
    max_length: int,
) -> DataReport:
    sizes = np.array(lengths or [0])
    return DataReport(
        rows=len(documents),
        tokens=sum(len(document) for document in documents),
        trained_tokens=sum(document.trained_tokens for document in documents),
        truncated=counts["truncated"],
        dropped_overlong=counts["dropped_overlong"],
        dropped_untrained=counts["dropped_untrained"],
        cut_to_nothing=counts["cut_to_nothing"],
        max_length=max_length,
        length_95=int(np.percentile(sizes, 95)),
        length_99=int(np.percentile(sizes, 99)),
        length_max=int(sizes.max()),
        notes=tuple(f"{note} ({count} rows)" for note, count in notes.items()),
    )


def _nothing_trained(report: DataReport, max_length: int) -> DataError:
    reasons = []
    if report.cut_to_nothing:
        reasons.append(
            f"{report.cut_to_nothing} rows are trained only after the first "
            f"max_length={max_length} tokens (the longest has {report.length_max})"
        )
    if report.dropped_overlong:
        reasons.append(f"{report.dropped_overlong} rows are longer than {max_length}")
    others = report.dropped_untrained - report.cut_to_nothing
    if others:
        reasons.append(f"{others} rows have no answer, or the chat template marks none")
    return DataError(
        f"no token of any row would be trained: {'; '.join(reasons) or 'no rows'}",
        fix="raise --max_length, or check --chat_template_path and --train_on",
        code="FJ-DATA-MASKED",
    )
