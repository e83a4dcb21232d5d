"""Compiled steps on disk, so that the same run need not trace and lower its own again.

XLA's compilation cache is found by the program, which takes ten seconds to write down.
A step here is found by all that decides about the program: settings, structure of the
model, shapes, device and the versions of the code. It is a program that the machine has
compiled itself; the folder may be deleted at any time.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pickle
import threading
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import serialize_executable

import fastjax
import kernels
from conversions.safetensors_file import SafetensorsFile
from conversions.safetensors_writer import write_safetensors
from fastjax.errors import ModelError, StorageError
from fastjax.train.compiled import CompiledStep, StepMemory

_KEPT_STEPS = 16
_PACKAGES = ("jax", "jaxlib", "flax", "optax")
_OPTIONS = ("jax_default_matmul_precision", "jax_enable_x64", "jax_debug_nans")


class StepCache:
    """Steps of one kind of run, one for each shape of batch."""

    def __init__(self, folder: Path, described: Mapping[str, Any]) -> None:
        """Reads nothing yet.

        Args:
          folder: Of the steps; made when it is needed.
          described: All that decides about the program but shapes, device and code;
            dataclasses and what JSON holds.
        """
        self._folder = folder
        self._described = described

    def load(self, arguments: tuple[Any, ...]) -> CompiledStep | None:
        """Returns the step for arguments of these shapes, None where there is none.

        Args:
          arguments: State, frozen weights and batch, or their shapes.
        """
        path = self._path(arguments)
        try:
            file = SafetensorsFile(path)
            payload = file.read("step").tobytes()
            about = json.loads(file.metadata["about"])
        except (OSError, ModelError, KeyError, ValueError):
            return None
        if hashlib.sha256(payload).hexdigest() != about["digest"]:
            return None
        with contextlib.suppress(OSError):  # a shared folder may be read-only
            os.utime(path)
        metrics = dict.fromkeys(about["metrics"], 0)
        try:
            run = serialize_executable.deserialize_and_load(
                payload,
                jax.tree.structure((arguments, {})),
                jax.tree.structure((arguments[0], metrics)),
                execution_devices=jax.devices()[:1],
            )
        except (jax.errors.JaxRuntimeError, pickle.UnpicklingError, ValueError):
            return None
        memory = about["memory"]
        return CompiledStep(
            run=run,
            memory=None if memory is None else StepMemory(**memory),
            implementations=about["implementations"],
        )

    def store(self, arguments: tuple[Any, ...], step: CompiledStep) -> None:
        """Writes a step while the run goes on; the process waits for its end."""
        threading.Thread(target=self._write, args=(arguments, step)).start()

    def _write(self, arguments: tuple[Any, ...], step: CompiledStep) -> None:
        try:
            payload, _, out_tree = serialize_executable.serialize(step.run)
        except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError):
            return  # not every backend can write a program down
        leaves = list(range(out_tree.num_leaves))
        memory = step.memory
        about = {
            "digest": hashlib.sha256(payload).hexdigest(),
            "metrics": sorted(jax.tree.unflatten(out_tree, leaves)[1]),
            "memory": None if memory is None else dataclasses.asdict(memory),
            "implementations": step.implementations,
        }
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_safetensors(
                self._path(arguments),
                {"step": np.frombuffer(payload, np.uint8)},
                {"about": json.dumps(about)},
            )
            self._forget_old()
        except (OSError, StorageError):  # a full or read-only disk keeps no step
            return

    def _forget_old(self) -> None:
        steps = self._folder.glob("*.safetensors")
        for path in sorted(steps, key=lambda p: p.stat().st_mtime)[:-_KEPT_STEPS]:
            path.unlink(missing_ok=True)

    def _path(self, arguments: tuple[Any, ...]) -> Path:
        shapes = [
            (jax.tree_util.keystr(place), str(leaf.dtype), leaf.shape)
            for place, leaf in jax.tree_util.tree_leaves_with_path(arguments)
        ]
        device = jax.devices()[0]
        key = {
            "described": self._described,
            "shapes": shapes,
            "device": (device.device_kind, device.client.platform_version),
            "versions": [version(name) for name in _PACKAGES],
            "flags": os.environ.get("XLA_FLAGS", ""),
            "options": {name: jax.config.values[name] for name in _OPTIONS},
            "code": _code_digest(),
        }
        text = json.dumps(key, sort_keys=True, default=_plain)
        name = hashlib.sha256(text.encode()).hexdigest()[:32]
        return self._folder / f"{name}.safetensors"


def _plain(value: Any) -> Any:
    """Returns as JSON what JSON does not know; the same in every process."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, frozenset):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} has no place in a key")


def _code_digest() -> str:
    """Returns a hash of the code, and of the tables of measured tile sizes."""
    digest = hashlib.sha256()
    for path in _sources():
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _sources() -> Iterator[Path]:
    for package in (fastjax, kernels):
        for root in package.__path__:
            for pattern in ("*.py", "*.json"):
                yield from sorted(Path(root).rglob(pattern))
