"""Measures the loss of a model on a data file."""

from fastjax.cli import run

if __name__ == "__main__":
    raise SystemExit(run("evaluate"))
