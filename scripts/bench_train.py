"""Times the QLoRA step of a preset on random weights made on the device."""

from fastjax.cli import run

if __name__ == "__main__":
    raise SystemExit(run("bench-train"))
