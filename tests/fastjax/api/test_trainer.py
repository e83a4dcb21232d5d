"""`SFTTrainer` as scripts use it."""

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pandas
import pytest

from fastjax.api import (
    FastLanguageModel,
    SFTConfig,
    SFTTrainer,
    TrainingArguments,
    get_chat_template,
    load_model,
    train_on_responses_only,
)
from fastjax.api.training import require_possible
from fastjax.errors import ConfigError, DataError, StorageError

pytestmark = pytest.mark.usefixtures("compiled_once")

Make = Callable[..., SFTTrainer]
TEXTS = [{"text": f"Number {n} comes before number {n + 1}."} for n in range(8)]
MESSAGES = [
    {
        "messages": [
            {"role": "user", "content": f"What comes after {n}?"},
            {"role": "assistant", "content": f"{n + 1}"},
        ]
    }
    for n in range(8)
]
USER = "<|start_header_id|>user<|end_header_id|>\n\n"
ASSISTANT = "<|start_header_id|>assistant<|end_header_id|>\n\n"


def metrics_of(trainer: SFTTrainer) -> list[dict]:
    text = (Path(trainer.config.output_dir) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_train_evaluate_predict_and_save(
    model: Any, trainer_of: Make, tmp_path: Path
) -> None:
    trainer = trainer_of(
        model,
        {"eval_strategy": "epoch", "save_strategy": "no", "learning_rate": 1e-2},
        train_dataset=datasets.Dataset.from_list(TEXTS),
        eval_dataset=TEXTS[:3],
    )
    before = trainer.evaluate()
    stats = trainer.train()
    assert stats.global_step == 2
    assert stats.metrics["train_runtime"] > 0
    assert math.isfinite(stats.training_loss)
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"]
    assert after["eval_perplexity"] == pytest.approx(math.exp(after["eval_loss"]))
    predicted = trainer.predict(TEXTS[:3])
    assert predicted.predictions.shape == predicted.label_ids.shape
    assert predicted.predictions.shape[0] == 3
    assert predicted.metrics["test_loss"] == pytest.approx(after["eval_loss"], rel=1e-4)
    assert (predicted.predictions[predicted.label_ids < 0] == 0).all()
    saved = trainer.save_model(tmp_path / "saved")
    ids = np.arange(8, dtype=np.int32)[None] + 20
    again = load_model(str(saved), dtype="float32")
    np.testing.assert_array_equal(again.logits(ids), model.logits(ids))
    assert again.tokenizer is not None


def test_the_state_tells_of_the_run_as_scripts_plot_it(
    model: Any, trainer_of: Make
) -> None:
    trainer = trainer_of(model, {"eval_strategy": "epoch"}, eval_dataset=TEXTS[:2])
    assert trainer.state.log_history == []
    stats = trainer.train()
    history = trainer.state.log_history
    losses = [entry for entry in history if "loss" in entry]
    assert [entry["step"] for entry in losses] == [1, 2]
    assert all(entry.keys() >= {"learning_rate", "epoch"} for entry in losses)
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [2]
    assert history[-1]["train_loss"] == stats.training_loss
    assert trainer.state.global_step == 2
    assert trainer.state.epoch == history[-1]["epoch"]
    (Path(trainer.config.output_dir) / "metrics.jsonl").unlink()
    trainer.train(resume_from_checkpoint=True)
    (last,) = trainer.state.log_history
    assert last["train_loss"] == stats.training_loss


def test_the_rows_that_train_can_be_looked_at(model: Any, trainer_of: Make) -> None:
    trainer = trainer_of(model, train_dataset=MESSAGES, eval_dataset=MESSAGES[:2])
    assert len(trainer.train_dataset) == len(MESSAGES)
    row = trainer.train_dataset[5]
    assert "What comes after 5?" in model.tokenizer.decode(row["input_ids"])
    trained = [token for token in row["labels"] if token != -100]
    assert model.tokenizer.decode(trained).startswith("6")
    assert row["attention_mask"] == [1] * len(row["labels"])
    assert len(trainer.train_dataset[2:4]) == 2
    assert trainer.eval_dataset is not None
    assert len(trainer.eval_dataset) == 2
    assert trainer_of(model).eval_dataset is None


@pytest.mark.parametrize(
    ("args", "evaluated", "saved"),
    [
        ({"eval_strategy": "no", "save_strategy": "no"}, [], [4]),
        ({"eval_strategy": "epoch", "save_strategy": "epoch"}, [2, 4], [2, 4]),
        ({"eval_strategy": "steps", "save_steps": 3}, [1, 2, 3, 4], [3, 4]),
    ],
)
def test_when_it_evaluates_and_saves(
    model: Any, trainer_of: Make, args: dict, evaluated: list[int], saved: list[int]
) -> None:
    epochs = {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 4}
    trainer = trainer_of(model, epochs | args, eval_dataset=TEXTS[:2], packing=False)
    trainer.train()
    lines = metrics_of(trainer)
    assert [line["step"] for line in lines if "eval_loss" in line] == evaluated
    folders = sorted(Path(trainer.config.output_dir).glob("checkpoint-*"))
    assert [int(folder.name[-6:]) for folder in folders] == saved


def test_evaluation_without_data_is_refused(model: Any, trainer_of: Make) -> None:
    trainer = trainer_of(model, {"eval_strategy": "epoch"})
    with pytest.raises(ConfigError, match="needs evaluation data"):
        trainer.train()
    with pytest.raises(ConfigError, match="there is no evaluation data"):
        trainer.evaluate()


@pytest.mark.parametrize(
    "args", [{}, {"eval_strategy": "epoch"}, {"early_stopping_patience": 2}]
)
def test_the_advice_without_evaluation_data_leads_to_no_other_error(
    model: Any, trainer_of: Make, args: dict
) -> None:
    trainer = trainer_of(model, {"load_best_model_at_end": True} | args)
    with pytest.raises(ConfigError, match="needs evaluation data") as caught:
        require_possible(trainer.config, trainer.data)
    _, _, advice = caught.value.fix.partition(", or ")
    assert all(name in advice for name in ("leave out", "load_best_model_at_end"))
    left_out = args | {"load_best_model_at_end": False, "early_stopping_patience": 0}
    assert args.keys() - {"eval_strategy"} <= set(re.findall(r"\w+", advice))
    if "set eval_strategy to no" in advice:
        left_out["eval_strategy"] = "no"
    allowed = trainer_of(model, left_out)
    require_possible(allowed.config, allowed.data)


def test_packing_puts_rows_together(model: Any, trainer_of: Make) -> None:
    apart = trainer_of(model, packing=False)
    packed = trainer_of(model, packing=True, max_seq_length=128)
    assert not apart.data.packing
    assert packed.data.packing
    assert packed.config.data.max_length == 128
    assert math.isfinite(packed.train().training_loss)
    total = sum(len(document) for document in packed.data.train)
    assert metrics_of(packed)[-1]["num_tokens"] >= total


def test_full_finetuning_changes_every_weight(
    small_model: Path, trainer_of: Make, tmp_path: Path
) -> None:
    model, _ = FastLanguageModel.from_pretrained(
        str(small_model), dtype="float32", full_finetuning=True
    )
    before = np.asarray(model.decoder.norm.weight.get_value())
    trainer = trainer_of(model, {"learning_rate": 1e-3})
    assert trainer.config.full_finetuning
    trainer.train()
    assert not np.array_equal(before, model.decoder.norm.weight.get_value())
    ids = np.arange(6, dtype=np.int32)[None]
    again = load_model(str(tmp_path / "out" / "model"), dtype="float32")
    np.testing.assert_allclose(again.logits(ids), model.logits(ids), atol=1e-5)


def test_a_whole_model_is_written_beside_what_lies_there(
    small_model: Path, trainer_of: Make
) -> None:
    model, _ = FastLanguageModel.from_pretrained(
        str(small_model), dtype="float32", full_finetuning=True
    )
    trainer = trainer_of(model)
    trainer.train()
    folder = Path(trainer.config.output_dir)
    (folder / "notes.txt").write_text("mine")
    (folder / "model-00001-of-00002.safetensors").write_text("of an older model")
    before = {path for path in folder.rglob("*") if path.is_file()}
    assert trainer.save_model() == folder
    gone = before - {path for path in folder.rglob("*") if path.is_file()}
    assert {path.name for path in gone} == {"model-00001-of-00002.safetensors"}
    assert (folder / "notes.txt").read_text() == "mine"
    ids = np.arange(6, dtype=np.int32)[None]
    again = load_model(str(folder), dtype="float32")
    np.testing.assert_array_equal(again.logits(ids), model.logits(ids))
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(StorageError, match="beside an adapter"):
        trainer.save_model()


def test_float16_trains_with_a_scaled_loss(small_model: Path, trainer_of: Make) -> None:
    model, _ = FastLanguageModel.from_pretrained(str(small_model), 64, "float16", True)
    model = FastLanguageModel.get_peft_model(model, r=4)
    trainer = trainer_of(model, {"fp16": True, "bf16": False, "max_steps": 3})
    assert trainer.config.dtype == "float16"
    losses = [trainer.train().training_loss]
    losses += [line["loss"] for line in metrics_of(trainer)]
    assert all(math.isfinite(loss) for loss in losses)
    for leaf in jax.tree.leaves(model.split()[1]):
        assert leaf.dtype == np.float32
        assert np.isfinite(leaf).all()


def test_the_arguments_choose_the_precision(model: Any, trainer_of: Make) -> None:
    assert trainer_of(model).config.dtype == "float32"
    trainer = trainer_of(model, {"bf16": True, "fp16": False})
    assert trainer.config.dtype == "bfloat16"
    assert model.spec.compute_dtype == "bfloat16"
    ids = jnp.array([[7, 8]], jnp.int32)
    hidden = model.decoder(ids, positions=jnp.array([[0, 1]], jnp.int32))
    assert hidden.dtype == jnp.bfloat16


def test_lengths_come_from_the_nearest_who_says(model: Any, trainer_of: Make) -> None:
    assert trainer_of(model).config.data.max_length == 64
    assert trainer_of(model, {"max_length": 2048}).config.data.max_length == 2048
    both = trainer_of(model, {"max_length": 2048}, max_seq_length=32)
    assert both.config.data.max_length == 32


def test_the_checkpointing_of_the_adapter_is_used_unless_args_say_more(
    model: Any, trainer_of: Make
) -> None:
    unsloth = FastLanguageModel.get_peft_model(
        model, r=4, use_gradient_checkpointing="unsloth"
    )
    assert trainer_of(unsloth).config.remat == "layer"
    args = {"gradient_checkpointing": False}
    assert trainer_of(unsloth, args).config.remat == "none"


def test_responses_only(model: Any, trainer_of: Make) -> None:
    trainer = trainer_of(model, train_dataset=MESSAGES)
    tokenizer = model.tokenizer
    rendered = [
        {"text": tokenizer.apply_chat_template(row["messages"], tokenize=False)}
        for row in MESSAGES
    ]
    plain = trainer_of(model, train_dataset=rendered)
    masked = train_on_responses_only(
        plain, instruction_part=USER, response_part=ASSISTANT
    )
    assert masked is plain
    for ours, theirs in zip(trainer.data.train, masked.data.train, strict=True):
        assert ours.input_ids.tolist() == theirs.input_ids.tolist()
        assert ours.trained.tolist() == theirs.trained.tolist()
    with pytest.raises(DataError, match="8 rows have nothing after 'A:'") as caught:
        train_on_responses_only(plain, instruction_part="U:", response_part="A:")
    assert "response_part" in caught.value.fix
    assert plain.data is masked.data
    assert plain.evaluate(rendered)["eval_rows"] == len(rendered)


def test_methods_of_other_trainers_name_what_to_use(
    model: Any, trainer_of: Make
) -> None:
    trainer = trainer_of(model)
    assert trainer.processing_class.wrapped is model.tokenizer
    for name, advice in (
        ("save_state", "holds its state"),
        ("tokenizer", "processing_class"),
        ("push_to_hub", "fastjax push"),
    ):
        with pytest.raises(
            AttributeError, match=f"SFTTrainer has no '{name}': .*{advice}"
        ):
            getattr(trainer, name)
    with pytest.raises(AttributeError, match=r"has no 'nothing'$"):
        _ = trainer.nothing
    assert copy.copy(trainer).data is trainer.data


@pytest.mark.parametrize("name", ["llama-3", "llama-3.1", "llama-3.3", "alpaca"])
def test_chat_templates_by_name(small_model: Path, name: str) -> None:
    _, tokenizer = FastLanguageModel.from_pretrained(str(small_model), 64, "float32")
    assert get_chat_template(tokenizer, chat_template=name) is tokenizer
    shown = tokenizer.apply_chat_template(MESSAGES[0]["messages"], tokenize=False)
    assert "What comes after 0?" in shown
    assert ("Today Date: 26 Jul 2024\n\n<|eot_id|>" in shown) == ("3." in name)


def test_chat_templates_that_do_not_fit(small_model: Path) -> None:
    _, tokenizer = FastLanguageModel.from_pretrained(str(small_model), 64, "float32")
    with pytest.raises(ConfigError, match="im_start"):
        get_chat_template(tokenizer, chat_template="qwen-2.5")
    with pytest.raises(ConfigError, match="must be one of llama-3"):
        get_chat_template(tokenizer, chat_template="zephyr-7")
    with pytest.raises(ConfigError, match=r"standardize_sharegpt.*role and content"):
        get_chat_template(tokenizer, "llama-3", {"role": "from"})
    eos = tokenizer.eos_token
    tokenizer.eos_token = "<|pad|>"
    get_chat_template(tokenizer, "llama-3", map_eos_token=False)
    assert tokenizer.eos_token == "<|pad|>"
    get_chat_template(tokenizer, "llama-3")
    assert tokenizer.eos_token == eos


def test_a_text_column_made_of_messages_is_what_trains(
    model: Any, trainer_of: Make
) -> None:
    rows = [row | {"text": f"Chat {i}"} for i, row in enumerate(MESSAGES)]
    trainer = trainer_of(model, train_dataset=rows, dataset_text_field="text")
    assert "Chat 0" in model.tokenizer.decode(trainer.data.train[0].input_ids)


def test_formatting_functions_make_the_text_of_a_row(
    model: Any, trainer_of: Make, alpaca_file: Path
) -> None:
    rows = [json.loads(line) for line in alpaca_file.read_text().splitlines()]
    trainer = trainer_of(
        model,
        train_dataset=rows,
        formatting_func=lambda row: row["instruction"] + row["output"],
    )
    text = model.tokenizer.decode(trainer.data.train[0].input_ids)
    assert "Name number 0.It is 0." in text
    named = trainer_of(
        model,
        train_dataset=pandas.DataFrame(rows),
        formatting_func=lambda row: row["output"],
        dataset_text_field="body",
    )
    assert model.tokenizer.decode(named.data.train[0].input_ids[:-1]) == "It is 0."
    with pytest.raises(ConfigError, match=r"one row, not a list"):
        trainer_of(model, train_dataset=rows, formatting_func=lambda row: [""])
    with pytest.raises(ConfigError, match="rows in memory"):
        trainer_of(model, train_dataset=str(alpaca_file), formatting_func=str)


def test_what_would_have_no_effect_is_refused(model: Any, trainer_of: Make) -> None:
    padding = type("DataCollatorForSeq2Seq", (), {})()
    assert trainer_of(model, data_collator=padding).data.train
    masking = type("DataCollatorForCompletionOnlyLM", (), {})()
    with pytest.raises(ConfigError, match="train_on_responses_only"):
        trainer_of(model, data_collator=masking)
    with pytest.raises(ConfigError, match="callbacks"):
        trainer_of(model, callbacks=[SimpleNamespace()])
    with pytest.raises(ConfigError, match="call add_new_tokens"):
        trainer_of(model, {"new_tokens": ["<new>"]})


def test_a_model_without_adapters_has_nothing_to_train(
    small_model: Path, trainer_of: Make
) -> None:
    model, _ = FastLanguageModel.from_pretrained(str(small_model), 64, "float32")
    with pytest.raises(ConfigError, match="get_peft_model"):
        trainer_of(model)


def test_training_goes_on_from_where_it_is_told(model: Any, trainer_of: Make) -> None:
    trainer = trainer_of(model, {"save_steps": 1})
    trainer.train()
    folder = Path(trainer.config.output_dir)
    before = (folder / "adapter_model.safetensors").read_bytes()
    assert trainer.train(resume_from_checkpoint=True).global_step == 2
    assert trainer.result.was_finished
    first = str(folder / "checkpoint-000001")
    assert trainer.train(resume_from_checkpoint=first).global_step == 2
    assert len(trainer.result.step_seconds) == 1
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    assert (folder / "checkpoint-000002.old").is_dir()


def test_arguments_by_the_names_of_both_generations() -> None:
    for kind in (TrainingArguments, SFTConfig):
        args = kind(
            "somewhere", per_device_train_batch_size=3, evaluation_strategy="no"
        )
        assert args.output_dir == "somewhere"
        assert args.per_device_train_batch_size == 3
        assert args.given >= {"output_dir", "eval_strategy"}
    with pytest.raises(ConfigError, match="did you mean 'learning_rate'"):
        TrainingArguments(learning_rat=1)
    with pytest.raises(AttributeError, match="no field 'nothing'"):
        _ = TrainingArguments().nothing
