"""Decides once whether an untrusted chat template may run in this process."""

import functools
import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from fastjax.data.template_worker import EXTRA_CPU_SECONDS
from fastjax.errors import ModelError, printable

MAX_SOURCE_BYTES = 64 * 2**10
MAX_RENDERED_CHARACTERS = 4 * 2**20
MAX_WAIT_SECONDS = 60.0
"""The worker limits its computing time itself; this is for one that only sleeps."""


def check_template(
    source: str, special_tokens: Mapping[str, str], *, where: str = ""
) -> None:
    """Renders a small conversation in a worker with limits on time and memory.

    The sandbox of Jinja stops access to Python, but not endless loops nor texts of
    gigabytes. The verdict is kept for the life of the process.

    Raises:
      ModelError: The template fails, or breaks a limit.
    """
    size = len(source.encode("utf-8", errors="replace"))
    if size > MAX_SOURCE_BYTES:
        what = f"the chat template has {size} bytes, the limit is {MAX_SOURCE_BYTES}"
        raise _refused(what, where)
    fault = _fault(source, tuple(sorted(special_tokens.items())))
    if fault:
        raise _refused(f"the chat template cannot be used: {fault}", where)


def _refused(what: str, where: str) -> ModelError:
    fix = "correct it, or give another one with --chat_template_path"
    return ModelError(what, where=where, fix=fix, code="FJ-MODEL-TEMPLATE")


@functools.cache
def _fault(source: str, special_tokens: tuple[tuple[str, str], ...]) -> str:
    """Returns what is wrong with a template, or an empty string."""
    script = Path(__file__).with_name("template_worker.py")
    job = json.dumps({"source": source, "special_tokens": dict(special_tokens)})
    with subprocess.Popen(
        # -P keeps this folder off the module path, where `packing` and others live.
        [sys.executable, "-P", str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Unbuffered: a buffer could take the answer together with the first line, and
        # `communicate` would not see it.
        bufsize=0,
    ) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write(job.encode())
        worker.stdin.close()
        worker.stdin = None
        worker.stdout.readline()
        try:
            out, errors = worker.communicate(timeout=MAX_WAIT_SECONDS)
        except subprocess.TimeoutExpired:
            worker.kill()
            return f"it renders two short messages for over {MAX_WAIT_SECONDS:g} s"
    if worker.returncode == -signal.SIGXCPU:
        return f"it renders two short messages for over {EXTRA_CPU_SECONDS} s"
    if worker.returncode:
        lines = errors.decode(errors="replace").strip().splitlines() or [
            f"exit code {worker.returncode}"
        ]
        return printable(lines[-1])
    if int(out) > MAX_RENDERED_CHARACTERS:
        return f"it makes {int(out)} characters of two short messages"
    return ""
