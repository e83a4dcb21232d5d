"""Notices a run that does not learn: no gradient at all, or numbers that blew up."""

from collections.abc import Mapping

from fastjax.errors import ConfigError, DataError, TrainingDiverged

BAD_STEPS_TO_STOP = 2


def require_gradient(metrics: Mapping[str, float]) -> None:
    """Returns when the first step has something to learn from.

    Raises:
      DataError: No token of the batch carries loss.
      ConfigError: No trainable weight gets a gradient.
    """
    if metrics["num_tokens"] == 0:
        raise DataError(
            "no token of the first batch carries loss",
            fix="raise max_length, or check train_on and the chat template",
            code="FJ-DATA-MASKED",
        )
    if metrics["grad_norm"] == 0.0:
        raise ConfigError(
            "the gradient of the first step is exactly 0: nothing trainable takes part",
            fix="check lora_target_modules, or that the adapters are switched on",
            code="FJ-CONFIG-GRADIENT",
        )


def bad_steps_in_row(metrics: Mapping[str, float], before: int) -> int:
    """Returns how many steps in a row were not finite, this one included.

    Overflow of a scaled float16 loss is no fault while the scale can still fall.
    """
    if not metrics["skipped"]:
        return 0
    return before + 1 if metrics["loss_scale"] <= 1.0 else before


def diverged(
    step: int, metrics: Mapping[str, float], newest_checkpoint: str
) -> TrainingDiverged:
    """Returns the error for a run whose numbers are not finite any more."""
    loss, norm = metrics["loss"], metrics["grad_norm"]
    return TrainingDiverged(
        f"loss or gradient was not finite in {BAD_STEPS_TO_STOP} steps in a row",
        where=f"step {step}: loss {loss}, grad_norm {norm}; "
        f"newest checkpoint, untouched: {newest_checkpoint}",
        fix="lower learning_rate or max_grad_norm, or look at the rows of this step in "
        "nan_batch.jsonl",
    )
