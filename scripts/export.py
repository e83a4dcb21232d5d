"""Writes the merged model of an adapter as a Hugging Face folder."""

from fastjax.cli import run

if __name__ == "__main__":
    raise SystemExit(run("export"))
