"""Prints what the standard library documents, as JSON.

A script for a fresh interpreter without site packages: other libraries replace
functions of the standard library, and walking it imports about 150 modules.
"""

import importlib
import inspect
import json
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

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


class Entry(NamedTuple):
    """One documented name of the standard library."""

    name: str
    kind: str
    signature: str
    documentation: str


def documented_names() -> list[Entry]:
    """Returns every documented name once; of equal texts the first name stays."""
    found: dict[str, Entry] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Deprecated names are documented as well.
        for module_name in _MODULES.split():
            try:
                module = importlib.import_module(module_name)
            except ImportError:  # Not on this platform.
                continue
            for entry in _module_entries(module_name, module):
                found.setdefault(entry.documentation, entry)
    return list(found.values())


def _module_entries(module_name: str, module: ModuleType) -> Iterator[Entry]:
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


def _class_entries(name: str, owner: type) -> Iterator[Entry]:
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


def _entry(name: str, kind: str, member: object) -> Iterator[Entry]:
    text = getattr(member, "__doc__", None)
    if not isinstance(text, str) or " at 0x" in text:
        return
    documentation = inspect.cleandoc(text).strip()
    if len(documentation) >= 20:
        yield Entry(
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
    differing = (" at 0x", sys.prefix, sys.base_prefix, sys.executable)
    return "" if any(text in signature for text in differing) else signature


if __name__ == "__main__":
    json.dump(documented_names(), sys.stdout)
