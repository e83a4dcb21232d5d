"""Which modules `target_modules` means, by the rules of PEFT."""

import re
from collections.abc import Sequence

from fastjax.config import ALL_LINEAR
from fastjax.errors import ConfigError, printable

_MODEL, _HEAD = "model.", "lm_head"


def full_name(module: str) -> str:
    """Returns Hugging Face's full name of one of our modules."""
    return module if module == _HEAD else _MODEL + module


def own_name(name: str) -> str:
    """Returns our name of a module from Hugging Face's full one."""
    return name.removeprefix(_MODEL)


def adaptable_modules(
    target: str | tuple[str, ...], linears: Sequence[str], *, is_tied: bool
) -> list[str]:
    """Returns the full names that a target may mean.

    Args:
      target: "all-linear" means linears of the layers alone; what else is named may
        be the embeddings or the output head.
      linears: Full names of the linears of the layers.
      is_tied: One table is both, and has the embeddings' name.
    """
    if target == ALL_LINEAR:
        return [*linears]
    tables = ["embed_tokens"] if is_tied else ["embed_tokens", _HEAD]
    return [*linears, *map(full_name, tables)]


def matched_modules(
    target: str | tuple[str, ...], names: Sequence[str]
) -> tuple[str, ...]:
    """Returns the names that `target` matches, in their own order.

    Args:
      target: "all-linear" takes every name; another string is a regular expression
        that a full name must match; a tuple holds names that match whole or as the
        end of a name after a dot.
      names: Full module names, such as "model.layers.0.self_attn.q_proj".

    Raises:
      ConfigError: `target`, or one entry of the tuple, matches no name.
    """
    if target == ALL_LINEAR:
        return tuple(names)
    if isinstance(target, str):
        matched = tuple(name for name in names if _pattern(target).fullmatch(name))
        if not matched:
            raise _no_match(target, names)
        return matched
    for entry in target:
        if not any(ends_with_module(name, entry) for name in names):
            raise _no_match(entry, names)
    return tuple(
        name for name in names if any(ends_with_module(name, t) for t in target)
    )


def ends_with_module(name: str, target: str) -> bool:
    """Says whether `target` is the name or its end on a module boundary."""
    return name == target or name.endswith("." + target)


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(
            f"target_modules={printable(text)} is not a regular expression: {error}",
            fix="write a valid one, a list of names, or all-linear",
        ) from error


def _no_match(entry: str, names: Sequence[str]) -> ConfigError:
    known = sorted({name.rpartition(".")[2] for name in names})
    return ConfigError(
        f"target_modules={printable(entry)!r} matches no linear layer or table",
        where=f"modules that exist: {', '.join(known)}; in full, "
        f"{', '.join(names[:3])}, ...",
        fix="name some of them in a list, or use all-linear; a single string is a "
        "regular expression over the full name",
    )
