"""Compiled steps on disk, so that the same run need not trace and lower its own again.

XLA's compilation cache is found by the program, which takes ten seconds to write down.
A step here is found by all that decides about the program: settings, structure of the
model, shapes, device and the versions of the code. It is a program that the machine has
compiled itself, and loading it runs its code: files that others may have written are
not read. The folder may be deleted at any time.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pickle
import threading
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
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
from fastjax.files import code_digest, remove_abandoned
from fastjax.train.compiled import CompiledStep, StepMemory

_KEPT_STEPS = 64
_PACKAGES = ("jax", "jaxlib", "flax", "optax")
_PLUGINS = (
    "jax-cuda12-plugin",
    "jax-cuda12-pjrt",
    "jax-cuda13-plugin",
    "jax-cuda13-pjrt",
)
# What another build of the same versions may raise, or a damaged file.
_UNREADABLE = (
    *(OSError, ModelError, ValueError, LookupError, TypeError, AttributeError),
    *(ImportError, EOFError, pickle.UnpicklingError, jax.errors.JaxRuntimeError),
)
_OPTIONS = (
    *("jax_default_matmul_precision", "jax_enable_x64", "jax_debug_nans"),
    *("jax_debug_infs", "jax_default_prng_impl", "jax_threefry_partitionable"),
)
"""Of JAX, that change what a step computes or checks."""


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
        # Now, since files may change while the step is compiled.
        self._key = {
            "described": described,
            "versions": list(_versions()),
            "flags": os.environ.get("XLA_FLAGS", ""),
            "options": {name: jax.config.values[name] for name in _OPTIONS},
            "code": code_digest((*fastjax.__path__, *kernels.__path__)),
        }

    def load(self, arguments: tuple[Any, ...]) -> CompiledStep | None:
        """Returns the step for arguments of these shapes, None where there is none.

        Args:
          arguments: State, frozen weights and batch, or their shapes.
        """
        path = self._path(arguments)
        if not (_is_ours(self._folder) and _is_ours(path)):
            return None
        try:
            file = SafetensorsFile(path)
            payload = file.read("step").tobytes()
            about = json.loads(file.metadata["about"])
            if hashlib.sha256(payload).hexdigest() != about["digest"]:
                return None
            run = serialize_executable.deserialize_and_load(
                payload,
                jax.tree.structure((arguments, {})),
                jax.tree.structure((arguments[0], dict.fromkeys(about["metrics"], 0))),
                execution_devices=jax.devices()[:1],
            )
            memory = about["memory"] and StepMemory(**about["memory"])
            implementations = about["implementations"]
        except _UNREADABLE:
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return CompiledStep(run=run, memory=memory, implementations=implementations)

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
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            path = self._path(arguments)
            write_safetensors(
                path,
                {"step": np.frombuffer(payload, np.uint8)},
                {"about": json.dumps(about)},
            )
            path.chmod(0o600)
            self._forget_old()
        except (OSError, StorageError):  # a full or read-only disk keeps no step
            return

    def _forget_old(self) -> None:
        remove_abandoned(self._folder)
        steps = self._folder.glob("*.step")
        for path in sorted(steps, key=lambda p: p.stat().st_mtime)[:-_KEPT_STEPS]:
            path.unlink(missing_ok=True)

    def _path(self, arguments: tuple[Any, ...]) -> Path:
        shapes = [
            (jax.tree_util.keystr(place), str(leaf.dtype), leaf.shape)
            for place, leaf in jax.tree_util.tree_leaves_with_path(arguments)
        ]
        device = jax.devices()[0]
        key = {
            **self._key,
            "shapes": shapes,
            "device": (device.device_kind, device.client.platform_version),
        }
        text = json.dumps(key, sort_keys=True, default=_plain)
        name = hashlib.sha256(text.encode()).hexdigest()[:32]
        return self._folder / f"{name}.step"


def _is_ours(path: Path) -> bool:
    """Whether this user wrote what is there, and nobody else can."""
    try:
        found = path.stat()
    except OSError:
        return False
    return found.st_uid == os.getuid() and not found.st_mode & 0o022


def _versions() -> Iterator[str]:
    yield from map(version, _PACKAGES)
    for name in _PLUGINS:
        with contextlib.suppress(PackageNotFoundError):
            yield version(name)


def _plain(value: Any) -> Any:
    """Returns as JSON what JSON does not know; the same in every process."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, frozenset):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} has no place in a key")
