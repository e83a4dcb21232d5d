"""Times one QLoRA step of a preset by kind of kernel, on random weights."""

from fastjax.cli import run

if __name__ == "__main__":
    raise SystemExit(run("profile-step"))
