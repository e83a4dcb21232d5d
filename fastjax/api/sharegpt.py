"""`standardize_sharegpt`: turns of from and value as those of role and content."""

from collections.abc import Mapping
from typing import Any

from fastjax.data.conversation import RowFault, conversation, sharegpt_messages
from fastjax.data.frame_rows import frame_rows, is_frame
from fastjax.errors import DataError, printable

_TURNS = "conversations"


def standardize_sharegpt(dataset: Any) -> Any:
    """Returns the rows with their conversations as chat templates read them.

    A column `system` becomes the first message. `SFTTrainer` needs none of this: it
    reads ShareGPT's rows as they are.

    Args:
      dataset: A `datasets.Dataset`, which gives another one, or a DataFrame or rows
        in a list, which give a list.

    Raises:
      DataError: A row is not of this form; says which and why.
    """
    if hasattr(dataset, "map") and not is_frame(dataset):
        known = dataset.column_names
        if isinstance(known, Mapping):
            raise DataError(
                "these are several splits",
                where=", ".join(known),
                fix=f"give one, as dataset[{next(iter(known), 'train')!r}]",
            )
        merged = [name for name in ("system",) if name in (known or ())]
        return dataset.map(_standard, with_indices=True, remove_columns=merged)
    rows = frame_rows(dataset) if is_frame(dataset) else dataset
    return [
        {k: v for k, v in row.items() if k != "system"} | _standard(row, number)
        for number, row in enumerate(rows)
    ]


def _standard(row: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Returns the column that replaces a row's own."""
    where = f"row {number}"
    if _TURNS not in row:
        raise DataError(
            f"there is no column {_TURNS!r}, only {printable(list(row), 80)}",
            where=where,
            fix=f"rename it, as with dataset.rename_column(old, {_TURNS!r})",
        )
    if row[_TURNS] is None:
        return {_TURNS: None}
    try:
        messages = sharegpt_messages(row[_TURNS], row.get("system"))
        conversation(messages, where=where)
    except RowFault as fault:
        fix = "correct the row, or leave it out with dataset.filter"
        raise DataError(str(fault), where=where, fix=fix) from fault
    return {_TURNS: messages}
