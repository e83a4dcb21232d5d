"""Checks and normalises the messages of one conversation.

Accepted: the roles system, user, assistant and tool in any order (a template may be
stricter); content as a string, as a list of text parts, or null beside tool calls;
empty content of any message; tool arguments as an object or as its JSON string;
`"train": false` or `"weight": 0` to read a turn without training it.
Refused: no messages, unknown roles, content of another type, images and other media,
messages that are not objects, more than 2,000 messages.
"""

import difflib
import json
from collections.abc import Mapping, Sequence

from fastjax.data.examples import Conversation, Message
from fastjax.errors import printable

ROLES = ("system", "user", "assistant", "tool")
MAX_MESSAGES = 2000
_OTHER_NAMES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "developer": "system",
    "observation": "tool",
    "function": "tool",
}
_SHAREGPT = ("from", "value")
_KEPT = ("name", "tool_call_id", "reasoning_content")


class RowFault(ValueError):
    """A row cannot be used; the message names the field."""


def conversation(
    messages: object, tools: object = None, *, where: str, prompt: object = None
) -> Conversation:
    """Returns the checked conversation of a row.

    Args:
      messages: The "messages" column, or a completion that is a list of messages.
      tools: The "tools" column: a list of schemas, or its JSON string.
      where: File and line of the row.
      prompt: Messages that come first and are not trained.

    Raises:
      RowFault: The table at the head of this module refuses it.
    """
    first = _message_list(prompt, "prompt") if prompt is not None else []
    turns = first + _message_list(messages, "messages" if prompt is None else "it")
    muted = set(range(len(first)))
    muted |= {i for i, turn in enumerate(turns) if _is_muted(turn, i)}
    return Conversation(
        messages=tuple(_message(turn, i) for i, turn in enumerate(turns)),
        tools=_tools(tools),
        muted=frozenset(i for i in muted if turns[i].get("role") == "assistant"),
        has_prompt=prompt is not None,
        where=where,
    )


def sharegpt_messages(turns: object, system: object = None) -> list[dict[str, object]]:
    """Returns the messages of a "conversations" column of from and value.

    Turns that hold role and content already stay as they are. A function call is an
    assistant turn whose value is the JSON of name and arguments.

    Raises:
      RowFault: A turn is not of this form.
    """
    messages: list[dict[str, object]] = []
    if system:
        messages.append({"role": "system", "content": system})
    for i, turn in enumerate(_message_list(turns, "conversations")):
        if turn.get("from") is None:  # Arrow gives every turn the keys of all.
            kept = {str(key): value for key, value in turn.items()}
            messages.append({k: v for k, v in kept.items() if k not in _SHAREGPT})
            continue
        speaker, value = turn["from"], turn.get("value")
        kept = {key: turn[key] for key in ("train", "weight") if key in turn}
        if speaker == "function_call":
            call = _json_object(value, f"conversations[{i}].value")
            message = {"role": "assistant", "tool_calls": [{"function": call}]}
        else:
            role = _OTHER_NAMES.get(str(speaker), speaker)
            message = {"role": role, "content": value}
        messages.append({**message, **kept})
    return messages


def says_nothing(example: Conversation) -> bool:
    """Tells whether every trained assistant turn is empty."""
    turns = [
        message
        for i, message in enumerate(example.messages)
        if message["role"] == "assistant" and i not in example.muted
    ]
    return bool(turns) and not any(
        str(turn["content"]).strip() or turn.get("tool_calls") for turn in turns
    )


def string(value: object, field: str) -> str:
    """Returns `value`, a string that UTF-8 can hold.

    Raises:
      RowFault: It is something else.
    """
    if not isinstance(value, str):
        raise RowFault(f"{field} must be a string, not {kind_of(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        what = f"{field} holds half of a surrogate pair at character {error.start}"
        raise RowFault(what) from error
    return value


def _message_list(value: object, field: str) -> list[Mapping[str, object]]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise RowFault(f"{field} must be a list of messages, not {kind_of(value)}")
    if not value:
        raise RowFault(f"{field} is an empty list")
    if len(value) > MAX_MESSAGES:
        raise RowFault(f"{field} has {len(value)} entries, the limit is {MAX_MESSAGES}")
    for i, turn in enumerate(value):
        if not isinstance(turn, Mapping):
            raise RowFault(f"{field}[{i}] must be an object, not {kind_of(turn)}")
    return list(value)


def _message(turn: Mapping[str, object], index: int) -> Message:
    field = f"messages[{index}]"
    message: Message = {"role": _role(turn.get("role"), field)}
    calls = turn.get("tool_calls")
    message["content"] = _content(turn.get("content"), f"{field}.content", bool(calls))
    if calls:
        message["tool_calls"] = _tool_calls(calls, f"{field}.tool_calls")
    for key in _KEPT:
        if turn.get(key) is not None:
            message[key] = string(turn[key], f"{field}.{key}")
    return message


def _role(role: object, field: str) -> str:
    if isinstance(role, str) and role in ROLES:
        return role
    shown = printable(role, 40)
    close = difflib.get_close_matches(str(role), ROLES, n=1)
    meant = _OTHER_NAMES.get(str(role)) or (close[0] if close else None)
    hint = f"; did you mean {meant!r}?" if meant else ""
    raise RowFault(f"{field}.role is {shown!r}, not one of {', '.join(ROLES)}{hint}")


def _content(value: object, field: str, has_calls: bool) -> str:
    if value is None and has_calls:
        return ""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "".join(_part(part, f"{field}[{i}]") for i, part in enumerate(value))
    return string(value, field)


def _part(part: object, field: str) -> str:
    if not isinstance(part, Mapping):
        raise RowFault(f"{field} must be an object with a type, not {kind_of(part)}")
    kind = part.get("type")
    if kind != "text":
        shown = printable(kind, 40)
        what = f"{field} has the type {shown!r}: images are not supported, nor other "
        raise RowFault(f"{what}media; fastjax trains on text")
    return string(part.get("text"), f"{field}.text")


def _tool_calls(value: object, field: str) -> list[dict[str, object]]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise RowFault(f"{field} must be a list, not {kind_of(value)}")
    return [_tool_call(call, f"{field}[{i}]") for i, call in enumerate(value)]


def _tool_call(call: object, field: str) -> dict[str, object]:
    inner = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(inner, Mapping):
        raise RowFault(f"{field} must be an object with a function")
    function = {
        "name": string(inner.get("name"), f"{field}.function.name"),
        "arguments": _json_object(inner.get("arguments"), f"{field}.arguments"),
    }
    kept: dict[str, object] = {"type": "function", "function": function}
    if call.get("id") is not None:
        kept["id"] = string(call["id"], f"{field}.id")
    return kept


def _json_object(value: object, field: str) -> dict[str, object]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RowFault(f"{field} is not valid JSON") from error
    if not isinstance(value, Mapping):
        raise RowFault(f"{field} must be an object, not {kind_of(value)}")
    return dict(value)


def _tools(value: object) -> tuple[dict[str, object], ...]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RowFault("tools is not valid JSON") from error
    if not value:
        return ()
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise RowFault(f"tools must be a list, not {kind_of(value)}")
    return tuple(_json_object(tool, f"tools[{i}]") for i, tool in enumerate(value))


def _is_muted(turn: Mapping[str, object], index: int) -> bool:
    train, weight = turn.get("train"), turn.get("weight")
    if train not in (None, True, False):
        raise RowFault(f"messages[{index}].train must be true or false")
    if weight not in (None, 0, 1):
        raise RowFault(f"messages[{index}].weight must be 0 or 1")
    return train is False or weight == 0


def kind_of(value: object) -> str:
    """Returns a value's type in words."""
    name = type(value).__name__
    article = "an" if name[0] in "aeiou" else "a"
    return "null" if value is None else f"{article} {name}"
