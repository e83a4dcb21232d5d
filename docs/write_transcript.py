"""Runs the commands of docs/quickstart.md in an empty folder; prints what they print.

The page docs/first_half_hour.md is its output: `make transcript`.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "docs" / "quickstart.md"
_MARK = ": next section"
_FIRST_LINES, _LAST_LINES = 60, 20
_HEAD = """\
# The first half hour

What the commands of [quickstart.md](quickstart.md) print after the installation, on a
machine without a GPU; made by `make transcript`, which took {minutes:.0f} minutes.
"""


def sections(page: str) -> dict[str, str]:
    """Returns heading to commands of a page in Markdown."""
    parts = re.split(r"^## (.*)$", page, flags=re.MULTILINE)[1:]
    blocks = {
        title: re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        for title, text in zip(parts[::2], parts[1::2], strict=True)
    }
    return {title: "".join(found) for title, found in blocks.items()}


def shown(output: str) -> str:
    """Returns the lines of a section, the middle of many left out."""
    lines = [line.rstrip() for line in output.strip("\n").splitlines()]
    if len(lines) > _FIRST_LINES + _LAST_LINES:
        lines = [*lines[:_FIRST_LINES], "...", *lines[-_LAST_LINES:]]
    return "\n".join(lines)


def transcript(commands: dict[str, str]) -> dict[str, str]:
    """Returns heading to commands and their output, as a terminal shows them."""
    program = "".join(f"{_MARK}\n{text}" for text in commands.values())
    with tempfile.TemporaryDirectory(prefix="fastjax-") as folder:
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "FASTJAX_CACHE": f"{folder}/cache",
            "COLUMNS": "100",
        }
        script = Path(folder) / "commands.sh"
        script.write_text(program, encoding="utf-8")
        (place := Path(folder) / "work").mkdir()
        done = subprocess.run(
            ["bash", "-v", script],
            cwd=place,
            env=environment,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    output = done.stdout.replace(f"{folder}/work", "~").replace(folder, "~")
    output = re.sub(r"\bLinux-\S+?-(x86_64|aarch64)", r"Linux-\1", output)
    parts = output.split(f"{_MARK}\n")[1:]
    return dict(zip(commands, parts, strict=True))


def main() -> None:
    """Prints the page."""
    start = time.monotonic()
    commands = sections(QUICKSTART.read_text(encoding="utf-8"))
    found = transcript(commands)
    minutes = (time.monotonic() - start) / 60
    sys.stdout.write(_HEAD.format(minutes=minutes))
    for title, output in found.items():
        sys.stdout.write(f"\n## {title}\n\n```text\n{shown(output)}\n```\n")


if __name__ == "__main__":
    main()
