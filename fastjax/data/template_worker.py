"""Renders an untrusted chat template once, in a process of its own.

Reads {"source", "special_tokens"} as JSON from standard input, says "ready", renders
two small conversations and prints how many characters came out. Any exception ends
the process: its last line tells the parent why. Run as a script, it needs only
transformers.
"""

import json
import math
import resource
import sys
from pathlib import Path

EXTRA_BYTES = 2**30
EXTRA_CPU_SECONDS = 2
_QUESTION = {"role": "user", "content": "What is two and two?"}
_ANSWER = {"role": "assistant", "content": "Four."}


def render_probe() -> None:
    """Renders a finished conversation and one that waits for its answer."""
    from transformers.utils.chat_template_utils import render_jinja_template

    job = json.load(sys.stdin)
    _limit_memory()
    _limit_time()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    size = 0
    for messages, waits in (([_QUESTION, _ANSWER], False), ([_QUESTION], True)):
        texts, _ = render_jinja_template(
            [messages],
            chat_template=job["source"],
            add_generation_prompt=waits,
            **job["special_tokens"],
        )
        size = max(size, len(texts[0]))
    sys.stdout.write(f"{size}\n")


def _limit_memory() -> None:
    statm = Path("/proc/self/statm")
    if statm.exists():
        used = int(statm.read_text().split()[0]) * resource.getpagesize()
        limit = used + EXTRA_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _limit_time() -> None:
    """Ends the process by a signal after some seconds of its own computing.

    A busy machine, where little time passes for one process, refuses no template.
    """
    usage = resource.getrusage(resource.RUSAGE_SELF)
    limit = math.ceil(usage.ru_utime + usage.ru_stime) + EXTRA_CPU_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))


if __name__ == "__main__":
    render_probe()
