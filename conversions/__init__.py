"""Checkpoint formats to and from weight trees; import from `hf`, `peft` or `bnb`."""
