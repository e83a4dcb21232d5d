"""Batches of a run: shuffled for training, in order for evaluation."""

import dataclasses

from fastjax.config import TrainConfig
from fastjax.data import Documents, Loader, TrainingData
from fastjax.errors import ConfigError
from fastjax.train.job import steps_of_run


def train_loader(config: TrainConfig, data: TrainingData) -> Loader:
    """Returns the shuffled batches of the training documents."""
    return data_loader(config, data, data.train, for_training=True)


def eval_loader(config: TrainConfig, data: TrainingData) -> Loader | None:
    """Returns the ordered batches of the evaluation documents, None without any."""
    if not data.evaluation or config.eval_strategy == "no":
        return None
    return data_loader(config, data, data.evaluation, for_training=False)


def evaluation_loader(config: TrainConfig, data: TrainingData) -> Loader:
    """Returns ordered batches of the evaluation documents, or of all when none are."""
    documents = data.evaluation or data.train
    return data_loader(config, data, documents, for_training=False)


def data_loader(
    config: TrainConfig, data: TrainingData, documents: Documents, *, for_training: bool
) -> Loader:
    """Returns batches of documents: shuffled for training, in order for evaluation."""
    batch_size = config.per_device_eval_batch_size
    if for_training:
        batch_size = config.per_device_train_batch_size
    return Loader(
        documents,
        batch_size=batch_size,
        accumulation=config.gradient_accumulation_steps if for_training else 1,
        max_length=config.data.max_length,
        packing=data.packing,
        seed=data_seed(config),
        shuffle=for_training,
    )


def data_seed(config: TrainConfig) -> int:
    """Returns the seed of the order of the data."""
    return config.seed if config.data_seed is None else config.data_seed


def in_steps(config: TrainConfig, steps_per_epoch: int) -> TrainConfig:
    """Returns the settings with steps in the place of epochs.

    Raises:
      ConfigError: The run is shorter than its warmup.
    """
    total, warmup = steps_of_run(config, steps_per_epoch), config.optimizer.warmup_steps
    if warmup > total:
        raise ConfigError(
            f"warmup_steps={warmup:g} is more than the {total} steps of this run: the "
            "learning rate would never reach its peak",
            fix="lower warmup_steps, or give a share of all steps, as 0.03",
        )
    changes: dict[str, int] = {}
    if config.eval_strategy == "epoch":
        changes["eval_steps"] = steps_per_epoch
    if config.save_strategy != "steps":
        is_epoch = config.save_strategy == "epoch"
        changes["save_steps"] = steps_per_epoch if is_epoch else 0
    return dataclasses.replace(config, **changes) if changes else config
