"""Writes a checkpoint of a preset's shapes with random weights."""

from fastjax.cli import run

if __name__ == "__main__":
    raise SystemExit(run("make-random-checkpoint"))
