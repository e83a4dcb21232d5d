"""Answers prompts with a model, with or without an adapter."""

from fastjax.cli import run

if __name__ == "__main__":
    raise SystemExit(run("generate"))
