"""Trains a tiny model from scratch, then a QLoRA adapter on it; needs no download."""

from fastjax.cli import run

if __name__ == "__main__":
    raise SystemExit(run("demo"))
