"""The data set that every machine has: the standard library's documentation.

Questions and answers about public functions, classes and methods, made from their
docstrings. The same Python gives the same rows. About 5 % of the names are held out.
"""

import dataclasses
import functools
import hashlib
import importlib
import inspect
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Literal

from fastjax.data.examples import Conversation, Message

Split = Literal["train", "validation"]
_HELD_OUT_ONE_IN = 20
_ANSWER_CHARACTERS = 600
# Modules that only define things when imported, on every platform that has them.
_MODULES = """
abc argparse array ast asyncio base64 bdb binascii bisect builtins bz2 calendar cmath
cmd code codecs codeop collections collections.abc colorsys compileall
concurrent.futures configparser contextlib contextvars copy copyreg csv ctypes
dataclasses datetime decimal difflib dis doctest email.generator email.header
email.headerregistry email.message email.parser email.policy email.utils enum errno
fcntl filecmp fileinput fnmatch fractions ftplib functools gc getopt getpass gettext
glob graphlib gzip hashlib heapq hmac html html.entities html.parser http http.client
http.cookiejar http.cookies http.server imaplib importlib importlib.abc
importlib.machinery importlib.metadata importlib.resources importlib.util inspect io
ipaddress itertools json keyword linecache locale logging logging.config
logging.handlers lzma mailbox marshal math mimetypes mmap modulefinder
multiprocessing.connection multiprocessing.managers multiprocessing.pool
multiprocessing.shared_memory netrc numbers operator optparse os os.path pathlib pdb
pickle pickletools pkgutil platform plistlib poplib pprint profile pstats
py_compile pyclbr pydoc queue quopri random re reprlib resource runpy sched secrets
select selectors shelve shlex shutil signal smtplib socket socketserver sqlite3 ssl
stat statistics string struct subprocess symtable sys sysconfig tabnanny tarfile
tempfile textwrap threading time timeit token tokenize trace traceback tracemalloc
types typing unicodedata unittest unittest.mock urllib.error urllib.parse
urllib.request urllib.response urllib.robotparser uuid venv warnings wave weakref
webbrowser wsgiref.handlers wsgiref.headers wsgiref.simple_server wsgiref.util
wsgiref.validate xml.dom.minidom xml.dom.pulldom xml.etree.ElementTree xml.sax
xml.sax.handler xml.sax.saxutils xml.sax.xmlreader xmlrpc.client xmlrpc.server
zipapp zipfile zipimport zlib zoneinfo
"""
# Where the platform's part of a module lives.
_HOMES = {"os": ("os", "posix", "posixpath", "genericpath", "nt", "ntpath")}
_QUESTIONS = (
    "What does `{name}` do?",
    "Explain `{name}` in Python.",
    "How is `{name}` used?",
    "What is `{name}` for?",
    "Describe the {kind} `{name}`.",
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """One documented name of the standard library."""

    name: str
    kind: str
    signature: str
    documentation: str


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


def _conversation(entry: _Entry) -> Conversation:
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


def _split_of(entry: _Entry) -> Split:
    held_out = _digest(entry.name)[0] % _HELD_OUT_ONE_IN == 0
    return "validation" if held_out else "train"


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


@functools.cache
def _entries() -> tuple[_Entry, ...]:
    """Returns every documented name once; of equal texts the first name stays."""
    found: dict[str, _Entry] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Deprecated names are documented as well.
        for module_name in _MODULES.split():
            try:
                module = importlib.import_module(module_name)
            except ImportError:  # Not on this platform.
                continue
            for entry in _module_entries(module_name, module):
                found.setdefault(entry.documentation, entry)
    return tuple(found.values())


def _module_entries(module_name: str, module: ModuleType) -> Iterator[_Entry]:
    root = module_name.split(".")[0]
    homes = _HOMES.get(root, (root,))
    for name in sorted(vars(module)):
        member = vars(module)[name]
        # C accelerators are called as their module, with an underscore.
        home = (getattr(member, "__module__", None) or "").lstrip("_").split(".")[0]
        if name.startswith("_") or home not in homes:
            continue
        full = name if root == "builtins" else f"{module_name}.{name}"
        if inspect.isclass(member):
            yield from _class_entries(full, member)
        elif inspect.isroutine(member):
            yield from _entry(full, "function", member)


def _class_entries(name: str, owner: type) -> Iterator[_Entry]:
    yield from _entry(name, "class", owner)
    for attribute in sorted(vars(owner)):
        member = vars(owner)[attribute]
        if attribute.startswith("_"):
            continue
        if isinstance(member, staticmethod | classmethod):
            member = member.__func__
        if inspect.isroutine(member):
            yield from _entry(f"{name}.{attribute}", "method", member)
        elif isinstance(member, property):
            yield from _entry(f"{name}.{attribute}", "property", member)


def _entry(name: str, kind: str, member: object) -> Iterator[_Entry]:
    text = getattr(member, "__doc__", None)
    if not isinstance(text, str) or " at 0x" in text:
        return
    documentation = inspect.cleandoc(text).strip()
    if len(documentation) >= 20:
        yield _Entry(
            name=name,
            kind=kind,
            signature=_signature(member),
            documentation=documentation,
        )


def _signature(member: object) -> str:
    """Returns the arguments as written; nothing where they differ by machine."""
    if not callable(member):
        return ""
    try:
        signature = str(inspect.signature(member))
    except (ValueError, TypeError):  # Many builtins have none.
        return ""
    differing = (" at 0x", sys.prefix, sys.base_prefix)
    return "" if any(text in signature for text in differing) else signature
