"""The memory that `fastjax check-data` takes for files of several sizes.

python benchmarks/check_data_memory.py MEGABYTES ... --out FILE
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_WORDS_A_ROW, _SAMPLE_SECONDS, _MEGABYTE = 400, 0.2, 10**6
_TEXT = (
    "a and as be by data each file for from in is it model of on one or row set step "
    "that the this to token train value weight when which with word"
)


def main() -> None:
    """Writes a JSON with what each size took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("megabytes", type=int, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    result = {
        "what": "fastjax check-data on prompt and completion rows of "
        f"{_WORDS_A_ROW} words; anonymous: the process's own memory, resident: with "
        "the mapped files that it reads and the kernel may drop; imports included",
        "command": "fastjax check-data --model tiny --dataset_name FILE --json",
        "device": f"{os.cpu_count()} CPU cores, shared with other work",
        "rows": [],
    }
    for megabytes in args.megabytes:
        with tempfile.TemporaryDirectory(prefix="fastjax-") as folder:
            path = Path(folder) / "rows.jsonl"
            rows = write_rows(path, megabytes * _MEGABYTE)
            took = measured(path, Path(folder) / "cache")
            entry = {"file_bytes": path.stat().st_size, "rows": rows, **took}
        result["rows"].append(entry)
        print(json.dumps(entry), flush=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def write_rows(path: Path, size: int) -> int:
    """Fills a file with rows that differ; returns how many there are."""
    draw, rows = random.Random(0), 0
    words = _TEXT.split()
    text = [" ".join(draw.choices(words, k=_WORDS_A_ROW)) for _ in range(1000)]
    with path.open("w") as file:
        while file.tell() < size:
            row = {
                "prompt": f"{rows} {text[rows % 997]}",
                "completion": text[rows % 991],
            }
            file.write(json.dumps(row) + "\n")
            rows += 1
    return rows


def measured(path: Path, cache: Path) -> dict[str, float]:
    """Returns peaks of memory, in bytes, and seconds of a check of a file."""
    command = [sys.executable, "-c", "from fastjax.cli import main; main()"]
    command += ["check-data", "--model", "tiny", "--dataset_name", path, "--json"]
    environment = os.environ | {"FASTJAX_CACHE": str(cache), "JAX_PLATFORMS": "cpu"}
    start = time.monotonic()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True
    )
    peaks = {"RssAnon": 0, "VmRSS": 0}
    while process.poll() is None:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        for name, value in (line.split(":", 1) for line in lines if ":" in line):
            if name in peaks:
                peaks[name] = max(peaks[name], int(value.split()[0]) * 1024)
        time.sleep(_SAMPLE_SECONDS)
    assert process.stdout is not None
    found = json.loads(process.stdout.read())
    return {
        "tokens": found["train"]["tokens"],
        "peak_anonymous_bytes": peaks["RssAnon"],
        "peak_resident_bytes": peaks["VmRSS"],
        "seconds": round(time.monotonic() - start, 1),
    }


if __name__ == "__main__":
    main()
