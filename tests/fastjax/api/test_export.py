"""Exports: every format from an adapter, without loading the model to write it."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from conversions.hf import Checkpoint
from fastjax.api import FastLanguageModel, load_model, run_export
from fastjax.api.finding import find_model
from fastjax.api.merging import Merge
from fastjax.config import ExportFormat, QuantConfig
from fastjax.errors import ConfigError, ModelError, StorageError

DENSE = QuantConfig(load_in_4bit=False)


@pytest.fixture(scope="module")
def adapter(small_model: Path, fixtures: Path, tmp_path_factory) -> Path:
    """PEFT's own adapter on the small model."""
    folder = tmp_path_factory.mktemp("adapter") / "lora"
    shutil.copytree(fixtures / "peft_lora_default", folder)
    path = folder / "adapter_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"base_model_name_or_path": str(small_model)}))
    return folder


def test_a_merge_is_the_adapter_and_says_so(adapter: Path, tmp_path: Path) -> None:
    lines = list(run_export(str(adapter), tmp_path / "out", dtype="float32"))
    assert lines[0].startswith("merged onto original weights, hf, float32")
    assert "same likeliest token 100.0%" in lines[1]
    expected = np.arange(20)[None]
    merged = load_model(str(tmp_path / "out"), dtype="float32", quant=DENSE)
    source = load_model(str(adapter), dtype="float32", quant=DENSE)
    np.testing.assert_allclose(
        merged.logits(expected), source.logits(expected), atol=1e-5
    )


def test_an_export_does_not_replace_what_it_reads(
    adapter: Path, small_model: Path, tmp_path: Path
) -> None:
    own = tmp_path / "runs" / "lora"
    shutil.copytree(adapter, own)
    before = sorted(path.name for path in own.iterdir())
    model = load_model(str(own), dtype="float32", quant=DENSE)
    for taken in (own, own.parent, small_model):
        with pytest.raises(StorageError, match=r"in use|no model's"):
            list(run_export(str(own), taken, overwrite=True))
    with pytest.raises(StorageError, match="in use"):
        model.save_pretrained_merged(small_model, overwrite=True)
    assert sorted(path.name for path in own.iterdir()) == before


def test_folders_of_runs_stand_for_what_they_made(
    adapter: Path, small_model: Path, tmp_path: Path
) -> None:
    run, lost = tmp_path / "run", tmp_path / "lost"
    (run / "checkpoint-000002").mkdir(parents=True)
    with pytest.raises(ModelError, match="not finished") as caught:
        find_model(str(run))
    assert str(run / "checkpoint-000002") in caught.value.fix
    shutil.copytree(small_model, run / "model")
    assert find_model(str(run)).folder == run / "model"
    (run / "run.json").write_text('{"is_finished": false}')
    with pytest.raises(ModelError, match="not finished"):
        find_model(str(run))
    with pytest.raises(ModelError, match="holds no model"):
        find_model(str(tmp_path))
    shutil.copytree(adapter, lost)
    path = lost / "adapter_config.json"
    base = {"base_model_name_or_path": str(tmp_path / "moved")}
    path.write_text(json.dumps(json.loads(path.read_text()) | base))
    with pytest.raises(ModelError, match="base model of this adapter is gone") as told:
        find_model(str(lost))
    assert told.value.where == str(path)


def test_the_base_that_training_saw_is_the_one_on_record(
    adapter: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(adapter, folder)
    out = tmp_path / "out"
    options: dict[str, Any] = {"dtype": "float32", "base_precision": "dequantised"}
    with pytest.raises(ConfigError, match=r"run\.json of its run is not beside it"):
        list(run_export(str(folder), out, **options))
    quant = QuantConfig(load_in_4bit=False, load_in_8bit=True)
    with pytest.raises(ConfigError, match="is onto the original"):
        list(run_export(str(folder), out, quant=quant))
    options["compare_logits"] = False
    list(run_export(str(folder), tmp_path / "told", quant=quant, **options))
    record = {"settings": dataclasses.asdict(quant)}
    (folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="training held the base as"):
        list(run_export(str(folder), out, quant=QuantConfig(), **options))
    list(run_export(str(folder), out, **options))
    weights = "model.safetensors"
    assert (out / weights).read_bytes() == (tmp_path / "told" / weights).read_bytes()
    source = load_model(str(folder), dtype="float32", quant=quant)
    merged = load_model(str(out), dtype="float32", quant=DENSE)
    ids = np.arange(20)[None]
    np.testing.assert_allclose(merged.logits(ids), source.logits(ids), atol=1e-4)


def test_what_training_saw_is_what_was_said_or_what_is_stored(
    small_model: Path, fixtures: Path
) -> None:
    quant = QuantConfig(load_in_4bit=False, load_in_8bit=True)
    plain = Merge.of(find_model(str(small_model)))
    assert plain.quant_of_training() == QuantConfig()
    assert dataclasses.replace(plain, quant=quant).quant_of_training() == quant
    stored = Merge.of(find_model(str(fixtures / "bnb_nf4_dq_bf16")))
    with pytest.raises(ConfigError, match="the base is stored in 4 bits"):
        dataclasses.replace(stored, quant=quant).quant_of_training()


@pytest.mark.parametrize("wrong", [0.5, np.nan])
def test_a_merge_that_is_not_its_source_is_no_result(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: float
) -> None:
    right = np.arange(12.0).reshape(1, 3, 4)
    logits = iter([right, right * wrong])
    monkeypatch.setattr("fastjax.api.export._probe_logits", lambda *_: next(logits))
    with pytest.raises(ModelError, match="not its source") as error:
        list(run_export(str(adapter), tmp_path / "out", dtype="float32"))
    assert error.value.exit_code == 4
    assert [path.name for path in tmp_path.iterdir()] == ["out.failed"]


def test_the_merge_streams(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No decoder is built: weights go from file to file."""

    def fail(*args: object, **options: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("fastjax.api.export.load_model", fail)
    monkeypatch.setattr("fastjax.models.build.build_decoder", fail)
    for output_format in ("hf", "bnb-4bit", "gguf", "gguf-lora"):
        target = tmp_path / output_format
        list(
            run_export(
                str(adapter),
                target,
                output_format=output_format,
                compare_logits=False,
            )
        )
        assert target.is_dir()
    assert sorted(p.name for p in (tmp_path / "gguf").iterdir()) == [
        "Modelfile",
        "model.gguf",
    ]
    assert "<|start_header_id|>" in (tmp_path / "gguf" / "Modelfile").read_text()
    names = Checkpoint(tmp_path / "bnb-4bit").tensors
    assert sum(".quant_state." in name for name in names) == 14


def test_a_model_in_memory_is_written_in_4_bits_and_as_gguf(
    adapter: Path, tmp_path: Path
) -> None:
    model, _ = FastLanguageModel.from_pretrained(str(adapter), 64, "float32")
    folder = model.save_pretrained_merged(tmp_path / "a", save_method="merged_4bit")
    reloaded = load_model(str(folder), dtype="float32")
    assert len(reloaded.spec.packed) == 14
    file = model.save_pretrained_gguf(tmp_path / "b", quantization_method="f16")
    assert (file / "model.gguf").read_bytes()[:4] == b"GGUF"


@pytest.mark.parametrize(
    "wrong",
    [
        {"dtype": "int8"},
        {"base_precision": "dequantized"},
        {"save_method": "merged_3bit"},
        {"quantization_method": "q9_0"},
    ],
)
def test_saving_refuses_values_that_it_does_not_know(
    adapter: Path, tmp_path: Path, wrong: dict[str, Any]
) -> None:
    model = load_model(str(adapter), dtype="float32", quant=DENSE)
    is_gguf = "quantization_method" in wrong
    save = model.save_pretrained_gguf if is_gguf else model.save_pretrained_merged
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))}=.*must be one of: "):
        save(tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


def test_saving_knows_the_values_of_unsloth(adapter: Path, tmp_path: Path) -> None:
    model = load_model(str(adapter), dtype="float32", quant=DENSE)
    packed = model.save_pretrained_merged(
        tmp_path / "a", save_method="merged_4bit_forced"
    )
    assert any(".quant_state." in name for name in Checkpoint(packed).tensors)
    for given, same in (("not_quantized", "f32"), (["q8_0"], "q8_0")):
        actual, expected = (
            model.save_pretrained_gguf(tmp_path / f"{i}", quantization_method=kind)
            for i, kind in enumerate((given, same))
        )
        name = "model.gguf"
        assert (actual / name).read_bytes() == (expected / name).read_bytes()
        shutil.rmtree(actual)
        shutil.rmtree(expected)


@pytest.mark.parametrize("output_format", get_args(ExportFormat))
def test_a_taken_name_is_found_before_the_model_is(
    tmp_path: Path, output_format: ExportFormat
) -> None:
    with pytest.raises(StorageError, match="exists already") as caught:
        next(run_export("./no-model", tmp_path, output_format=output_format))
    assert "--overwrite, in Python overwrite=True" in caught.value.fix


def test_exports_refuse_what_cannot_be(small_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs an adapter"):
        list(run_export(str(small_model), tmp_path / "a", output_format="gguf-lora"))
    bare = tmp_path / "bare"
    shutil.copytree(small_model, bare)
    (bare / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        list(run_export(str(bare), tmp_path / "c", output_format="gguf"))
    assert not (tmp_path / "c").exists()
