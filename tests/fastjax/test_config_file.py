"""YAML settings: strict, with lines in the messages, and written to run again."""

from pathlib import Path

import pytest

from fastjax.config import TrainConfig
from fastjax.config_file import config_yaml, read_config_file
from fastjax.errors import ConfigError
from fastjax.flat_config import train_config


def written(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def test_values_are_read_by_the_type_of_their_field(tmp_path: Path) -> None:
    text = """\
learning_rate: 1e-5  # YAML calls this text
warmup_steps: 5
save_strategy: no    # and this false
packing: off
lora_target_modules: [q_proj, v_proj]
resume: no
seed: "7"
"""
    config = read_config_file(written(tmp_path, text)).config
    assert config.optimizer.learning_rate == 1e-5
    assert config.optimizer.warmup_steps == 5.0
    assert config.save_strategy == "no"
    assert config.data.packing is False
    assert config.lora.lora_target_modules == ("q_proj", "v_proj")
    assert config.resume_from_checkpoint == "no"
    assert config.seed == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nlearning_rat: 2\n", "line 2: there is no field 'learning_rat'"),
        ("seed: 1\nmax_steps: x\n", "line 2: max_steps='x' must be a number"),
        ("seed: 1\nlr: 2\nseed: 3\n", "seed is given twice, first in line 1"),
        ("seed: 1\n\tlr: 2\n", "run.yaml:2"),
        ("seed: !!python/object:os.system 1\n", "run.yaml:1"),
        ("seed: [1\n", "not YAML"),
        ("", "holds no settings"),
        ("# nothing\n", "holds no settings"),
        ("- seed\n", "holds no settings"),
        ("seed\n", "holds no settings"),
        ("seed: {a: 1}\n", "seed="),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config_file(written(tmp_path, text))
    assert message in str(caught.value)
    assert "run.yaml" in str(caught.value)


def test_files_that_are_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_config_file(tmp_path / "none.yaml")
    path = tmp_path / "run.yaml"
    path.write_bytes(b"seed: \xff\xfe\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_config_file(path)
    path.write_bytes(b"#" * (1 << 20) + b"\nseed: 1\n")
    with pytest.raises(ConfigError, match="larger than 1 MiB"):
        read_config_file(path)


@pytest.mark.parametrize(
    "flat",
    [
        {},
        {
            "lora_target_modules": ["q_proj"],
            "learning_rate": 1e-5,
            "implementation": "attention=xla",
            "dataset_name": "a b.jsonl",
            "full_finetuning": True,
        },
    ],
)
def test_written_settings_read_back_as_they_were(tmp_path: Path, flat: dict) -> None:
    config = train_config(flat).config
    assert read_config_file(written(tmp_path, config_yaml(config))).config == config
    assert isinstance(config, TrainConfig)
