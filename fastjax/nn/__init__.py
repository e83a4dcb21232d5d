"""Flax modules of decoders, shared by every family."""
