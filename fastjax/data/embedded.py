"""The data set that every machine has: the standard library's documentation.

Questions and answers about public functions, classes and methods, made from their
docstrings. The same Python gives the same rows. About 5 % of the names are held out.
"""

import functools
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Literal

from fastjax.data.examples import Conversation, Message
from fastjax.data.stdlib_documentation import Entry

Split = Literal["train", "validation"]
_HELD_OUT_ONE_IN = 20
_ANSWER_CHARACTERS = 600
_QUESTIONS = (
    "What does `{name}` do?",
    "Explain `{name}` in Python.",
    "How is `{name}` used?",
    "What is `{name}` for?",
    "Describe the {kind} `{name}`.",
)


def embedded_examples(split: Split = "train") -> list[Conversation]:
    """Returns questions about the standard library, each with its answer."""
    return [_conversation(entry) for entry in _entries() if _split_of(entry) == split]


def embedded_text(split: Split = "train") -> list[str]:
    """Returns the documentation of each name as plain text."""
    return [
        f"{entry.name}{entry.signature}\n\n{entry.documentation}"
        for entry in _entries()
        if _split_of(entry) == split
    ]


def embedded_announcement() -> str:
    """Returns one line that says what the embedded data set is."""
    held_out = len(embedded_examples("validation"))
    count = len(_entries()) - held_out
    return (
        f"no data named: training on {count:,} questions about Python's standard "
        f"library, {held_out:,} held out (--dataset_name takes your own)"
    )


def _conversation(entry: Entry) -> Conversation:
    form = _QUESTIONS[_digest(entry.name)[1] % len(_QUESTIONS)]
    question = form.format(name=entry.name, kind=entry.kind)
    answer = _beginning(entry.documentation)
    if entry.signature:
        answer = f"`{entry.name}{entry.signature}`\n\n{answer}"
    messages: tuple[Message, ...] = (
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    )
    return Conversation(messages=messages, where=entry.name)


def _beginning(documentation: str) -> str:
    """Returns the first paragraphs, as many as fit in the length of an answer."""
    paragraphs = documentation.split("\n\n")
    answer = paragraphs[0]
    for paragraph in paragraphs[1:]:
        if len(answer) + len(paragraph) > _ANSWER_CHARACTERS:
            break
        answer += "\n\n" + paragraph
    return answer


def _split_of(entry: Entry) -> Split:
    held_out = _digest(entry.name)[0] % _HELD_OUT_ONE_IN == 0
    return "validation" if held_out else "train"


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


@functools.cache
def _entries() -> tuple[Entry, ...]:
    """Returns every documented name once; of equal texts the first name stays."""
    script = Path(__file__).with_name("stdlib_documentation.py")
    run = subprocess.run(
        # No site packages, no settings of the environment: equal rows everywhere.
        [sys.executable, "-I", "-S", str(script)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
    )
    return tuple(Entry(*fields) for fields in json.loads(run.stdout))
