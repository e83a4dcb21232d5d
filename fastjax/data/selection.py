"""Chooses documents by row: held out for evaluation, or weighted by their source."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from fastjax.data.documents import SOURCE_SHIFT, Documents
from fastjax.errors import ConfigError


def held_out(
    documents: Documents, size: float, *, seed: int
) -> tuple[Documents, Documents]:
    """Returns the documents without those of held-out rows, and those, both in order.

    Args:
      documents: What is split; pieces of one row stay together.
      size: A count of rows, or a share below 1.
      seed: Chooses them.

    Raises:
      ConfigError: Nothing would be left to train.
    """
    rows = np.unique(documents.rows)
    count = round(size) if size >= 1 else max(1, round(size * len(rows)))
    if count >= len(rows):
        raise ConfigError(
            f"val_set_size={size:g} leaves nothing of {len(rows)} rows to train"
        )
    held = np.isin(documents.rows, rows[_drawn(len(rows), seed)[:count]])
    kept = np.flatnonzero(~held)
    return documents.chosen(kept), documents.chosen(np.flatnonzero(held))


def weighted(documents: Documents, weights: Sequence[float], *, seed: int) -> Documents:
    """Returns the documents of an epoch in which sources count by their weights.

    A weight of 2.5 gives all rows of the source twice and a half of them once more,
    chosen by the seed.

    Args:
      documents: Of as many sources as there are weights.
      weights: How often the rows of each source come.
      seed: Chooses parts of a source.

    Raises:
      ConfigError: Weights and sources differ in number.
    """
    sources = documents.rows >> SOURCE_SHIFT
    chosen: list[Int64[np.ndarray, " n"]] = []
    for source, weight in enumerate(weights):
        own = np.flatnonzero(sources == source)
        rows = np.unique(documents.rows[own])
        copies, share = divmod(weight, 1.0)
        part = rows[_drawn(len(rows), seed + source)[: round(share * len(rows))]]
        chosen += [own] * int(copies)
        chosen.append(own[np.isin(documents.rows[own], part)])
    indices = np.concatenate(chosen)
    if not len(indices):
        raise ConfigError("dataset_weights leave no row to train")
    return documents.chosen(indices)


def shared_documents(train: Documents, evaluation: Documents) -> int:
    """Returns how many evaluation documents are training documents too."""
    if not evaluation:
        return 0
    hashes = evaluation.content_hashes()
    return int(np.isin(hashes, train.content_hashes()).sum())


def _drawn(count: int, seed: int) -> Int64[np.ndarray, " count"]:
    """Returns 0 .. count - 1 in an order of the seed, the same in every NumPy."""
    draws = np.random.PCG64(np.random.SeedSequence([seed])).random_raw(count)
    return np.argsort(draws, kind="stable")
