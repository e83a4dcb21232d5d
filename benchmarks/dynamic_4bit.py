"""What plain and dynamic 4-bit folders cost a small trained model, as JSON.

Usage: python benchmarks/dynamic_4bit.py [WORK_FOLDER]

The model learns as that of `make demo` does, but has half its width and five times its
steps, so that its weights have little to spare. Groups of linears are chosen on part of
its training text; the loss is on text that neither saw. Takes some ten minutes on two
cores; a trained model in the folder is taken again.
"""

import dataclasses
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from fastjax.api.calibration import REPORT_NAME
from fastjax.api.export import run_export
from fastjax.api.loading import load_model
from fastjax.api.training import evaluate_model, prepare_data
from fastjax.config import DataConfig, QuantConfig, TrainConfig
from fastjax.data import embedded_text
from fastjax.demo import train_base
from fastjax.files import read_json
from fastjax.models.registry import preset

STEPS = 2000
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CALIBRATION_DOCUMENTS = 200
RESULT = Path(__file__).parent / "results" / "cpu" / "dynamic-4bit.json"
# Name of a row -> format of the folder, and what dynamic folders may spend.
ROWS: dict[str, tuple[Any, float]] = {
    "16-bit": ("hf", 0.1),
    "plain 4-bit": ("bnb-4bit", 0.1),
    "dynamic 4-bit, 10 % more": ("bnb-dynamic", 0.1),
    "dynamic 4-bit, 25 % more": ("bnb-dynamic", 0.25),
}


def main(work: Path) -> None:
    """Trains, writes the folders, measures them, and writes the table."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    base = work / "base" / "model"
    if not base.is_dir():
        sizes = dataclasses.replace(preset("tiny").config, **SIZES)
        base = train_base(work, STEPS, Console(), sizes=sizes)
    text = work / "calibration.jsonl"
    documents = list(embedded_text("train"))[:CALIBRATION_DOCUMENTS]
    text.write_text("".join(json.dumps({"text": t}) + "\n" for t in documents))
    rows = []
    for name, (output_format, extra_memory) in ROWS.items():
        folder = work / name.replace(" ", "-")
        lines = run_export(
            str(base),
            folder,
            output_format=output_format,
            calibration_data=str(text),
            extra_memory=extra_memory,
            compare_logits=False,
            overwrite=True,
        )
        notes = list(lines)
        rows.append(measured(name, folder))
        print(rows[-1], *notes, sep="\n  ", flush=True)
    write(rows, commit.strip())


def measured(name: str, folder: Path) -> dict[str, Any]:
    """Returns the row of a folder: held-out loss and the bytes of its weights."""
    config = TrainConfig(
        model=str(folder),
        dtype="float32",
        per_device_eval_batch_size=8,
        quant=QuantConfig(load_in_4bit=False),
        data=DataConfig(max_length=256, packing=True),
    )
    model = load_model(str(folder), dtype="float32", quant=config.quant)
    held_out = [{"text": text} for text in embedded_text("validation")]
    data = prepare_data(config, model, train_source=held_out)
    loss = evaluate_model(model, config, data)["eval_loss"]
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    row = {"model": name, "loss": loss, "bytes": size, "gib": size / 2**30}
    report = folder / REPORT_NAME
    return row | (read_json(report) if report.is_file() else {})


def write(rows: list[dict[str, Any]], commit: str) -> None:
    """Writes the table with what it was made by."""
    values = {
        "what": "mean loss in nats a token on held-out text of a small model, trained "
        "as the demo's, whole and with its linears in 4 bits; activations in float32",
        "command": "python benchmarks/dynamic_4bit.py",
        "commit": commit,
        "device": f"CPU, {platform.machine()}",
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
        "model": {"preset": "tiny", **SIZES, "steps": STEPS},
        "rows": rows,
    }
    RESULT.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/dynamic-4bit"))
