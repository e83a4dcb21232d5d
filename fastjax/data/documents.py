"""Tokenised documents: flat arrays in memory or in mapped files, and their views."""

import dataclasses
import hashlib
import io
import mmap
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np
from jaxtyping import Bool, Int32, Int64

from fastjax.errors import StorageError, printable

TOKENS_NAME, TRAINED_NAME = "tokens.bin", "trained.bin"
SOURCE_SHIFT = 40
"""Bits of a row's number; those above tell which of several sources it is of."""

_MAPPED_TOKENS = 1 << 22


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Document:
    """Tokens of one example, or of a piece of it.

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


class Documents(Sequence[Document]):
    """Documents of a data set, or a choice of them.

    Only their places are held for each; tokens and masks lie end to end, so that a set
    larger than memory can be mapped from files.

    Args:
      tokens: Of all documents.
      trained: Mask of `tokens`.
      starts: Place of the first token of each document.
      lengths: Tokens of each document.
      rows: Number of the row that each document comes from, and of its source above
        `SOURCE_SHIFT`.
      maps: Of the files that `tokens` and `trained` lie in. What a pass over all
        documents has read is let go, else it would count as this process's memory.
    """

    def __init__(
        self,
        tokens: Int32[np.ndarray, " N"],
        trained: Bool[np.ndarray, " N"],
        *,
        starts: Int64[np.ndarray, " D"],
        lengths: Int64[np.ndarray, " D"],
        rows: Int64[np.ndarray, " D"],
        maps: tuple[mmap.mmap, ...] = (),
    ) -> None:
        self._tokens, self._trained, self._maps = tokens, trained, maps
        self._starts, self.lengths, self.rows = starts, lengths, rows

    @classmethod
    def of(cls, documents: Sequence[Document]) -> "Documents":
        """Returns documents as one set; each is a row."""
        if isinstance(documents, Documents):
            return documents
        writer = DocumentWriter()
        for row, document in enumerate(documents):
            writer.add(document, row)
        return writer.close()

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Document: ...

    @overload
    def __getitem__(self, index: slice) -> "Documents": ...

    def __getitem__(self, index: int | slice) -> "Document | Documents":
        """Returns a view of one document, or a choice of documents."""
        if isinstance(index, slice):
            return self.chosen(np.arange(len(self))[index])
        start = int(self._starts[index])
        end = start + int(self.lengths[index])
        return Document(self._tokens[start:end], self._trained[start:end])

    def chosen(self, indices: Int64[np.ndarray, " C"]) -> "Documents":
        """Returns the documents of these places, which may repeat."""
        return Documents(
            self._tokens,
            self._trained,
            starts=self._starts[indices],
            lengths=self.lengths[indices],
            rows=self.rows[indices],
            maps=self._maps,
        )

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.lengths.sum())

    @property
    def trained_tokens(self) -> int:
        """Targets of all documents that carry loss."""
        return sum(document.trained_tokens for document in self._read())

    def content_hashes(self) -> Int64[np.ndarray, " D"]:
        """Returns a hash of the tokens of each document, true in this process alone."""
        hashes = (hash(document.input_ids.tobytes()) for document in self._read())
        return np.fromiter(hashes, np.int64, len(self))

    def fingerprint(self) -> str:
        """Returns a hash of all lengths, tokens and masks, in order."""
        digest = hashlib.sha256(self.lengths.tobytes())
        for start, end in self._runs():
            digest.update(self._tokens[start:end].tobytes())
            digest.update(self._trained[start:end].tobytes())
        return digest.hexdigest()

    def _read(self) -> Iterator[Document]:
        return self._in_turn((len(document), document) for document in self)

    def _runs(self) -> Iterator[tuple[int, int]]:
        """Yields the borders of tokens that lie end to end, a few million at most."""
        borders = self._borders()
        return self._in_turn((end - start, (start, end)) for start, end in borders)

    def _in_turn[T](self, sized: Iterable[tuple[int, T]]) -> Iterator[T]:
        """Yields parts, given with their tokens; a few million are mapped at a time."""
        read = 0
        for tokens, part in sized:
            yield part
            read += tokens
            if read >= _MAPPED_TOKENS:
                for mapping in self._maps:
                    mapping.madvise(mmap.MADV_DONTNEED)
                read = 0

    def _borders(self) -> Iterator[tuple[int, int]]:
        if not len(self):
            return
        ends = self._starts + self.lengths
        breaks = np.flatnonzero(self._starts[1:] != ends[:-1]) + 1
        firsts = np.concatenate([[0], breaks])
        lasts = np.concatenate([breaks, [len(self)]]) - 1
        for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
            for start in range(
                int(self._starts[first]), int(ends[last]), _MAPPED_TOKENS
            ):
                yield start, min(start + _MAPPED_TOKENS, int(ends[last]))


class DocumentWriter:
    """Gathers documents, in memory or in two files of a folder.

    Args:
      folder: Takes the tokens and masks; None keeps them in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._tokens, self._trained = (
            self._opened(TOKENS_NAME),
            self._opened(TRAINED_NAME),
        )
        self._lengths, self._rows = array("q"), array("q")

    def add(self, document: Document, row: int) -> None:
        """Appends a document that comes from a row.

        Raises:
          StorageError: The disk is full.
        """
        try:
            self._tokens.write(document.input_ids.tobytes())
            self._trained.write(document.trained.tobytes())
        except OSError as error:
            raise StorageError(
                f"tokenised data cannot be written: {printable(error)}",
                where=str(self.folder),
                fix="free disk space, or hold the tokens in memory: "
                "--no-use_dataset_cache",
            ) from error
        self._lengths.append(len(document))
        self._rows.append(row)

    def close(self) -> Documents:
        """Returns what was added."""
        # Views: copies would double what is held for each document.
        lengths = np.asarray(self._lengths).view(np.int64)
        rows = np.asarray(self._rows).view(np.int64)
        if self.folder is not None:
            self._tokens.close()
            self._trained.close()
            return mapped(self.folder, lengths, rows)
        assert isinstance(self._tokens, io.BytesIO)
        assert isinstance(self._trained, io.BytesIO)
        tokens = np.frombuffer(self._tokens.getvalue(), np.int32)
        trained = np.frombuffer(self._trained.getvalue(), np.bool_)
        return _placed(tokens, trained, lengths, rows)

    def _opened(self, name: str) -> io.BufferedIOBase:
        return io.BytesIO() if self.folder is None else (self.folder / name).open("wb")


def mapped(
    folder: Path, lengths: Int64[np.ndarray, " D"], rows: Int64[np.ndarray, " D"]
) -> Documents:
    """Returns the documents whose tokens a `DocumentWriter` left in a folder."""
    if not lengths.sum():
        return Documents.of([])
    maps = _map(folder / TOKENS_NAME), _map(folder / TRAINED_NAME)
    tokens, trained = np.frombuffer(maps[0], np.int32), np.frombuffer(maps[1], np.bool_)
    return _placed(tokens, trained, lengths, rows, maps)


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _placed(
    tokens: Int32[np.ndarray, " N"],
    trained: Bool[np.ndarray, " N"],
    lengths: Int64[np.ndarray, " D"],
    rows: Int64[np.ndarray, " D"],
    maps: tuple[mmap.mmap, ...] = (),
) -> Documents:
    starts = np.cumsum(lengths)
    starts -= lengths
    return Documents(
        tokens, trained, starts=starts, lengths=lengths, rows=rows, maps=maps
    )
