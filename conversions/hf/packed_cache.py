"""Quantised copies of checkpoints: a model is quantised once on a machine.

A copy is found by the names, sizes, times and headers of the checkpoint's files, and
by how it was quantised. A thread of its own writes it when all weights are read, so
that these do not wait for the disk, and it appears when it is whole. The copies used
last are kept, and a tenth of the disk stays free; where it has no room there is none.
They may be deleted at any time: what cannot be read is quantised again.
"""

import contextlib
import hashlib
import os
import queue
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from conversions.bnb import quantised_names
from conversions.hf.checkpoint import Checkpoint
from conversions.hf.families import checkpoint_tensors
from conversions.hf.load import load_weights, stream_weights
from conversions.rules import Tensor
from conversions.safetensors_file import SafetensorsFile
from conversions.safetensors_header import TensorSpec
from conversions.safetensors_writer import PutTensor, safetensors_writer
from fastjax.config import DType, QuantConfig
from fastjax.errors import ModelError, StorageError
from fastjax.files import remove_abandoned, require_space
from fastjax.models.build import Weights
from fastjax.models.transformer_config import TransformerConfig
from fastjax.quantize import wanted_format
from fastjax.runtime import host_memory_bytes

_VERSION = 1
_LEAST_BYTES = 2**30
_IN_FLIGHT = 4
_WAIT_SECONDS = 1.0
_KEPT_COPIES = 8
_FREE_SHARE = 0.1
_HELD_SHARE = 0.2
"""Of the host's memory: where a copy takes more, loading waits for the disk."""


def load_packed_weights(
    checkpoint: Checkpoint,
    config: TransformerConfig,
    *,
    dtype: DType,
    quant: QuantConfig | None,
    folder: Path,
    least_bytes: int = _LEAST_BYTES,
) -> Weights:
    """Returns all weights of a checkpoint by our names, from a copy if there is one.

    Args:
      checkpoint: The files.
      config: Says exactly which tensors must be there.
      dtype: Of weights that are not quantised, and of dequantised values.
      quant: How the others are.
      folder: Of the copies; made when it is needed.
      least_bytes: Size of a checkpoint that is worth a copy.

    Raises:
      CheckpointMismatch: Tensors are missing, unexpected or misshapen.
      ModelError: A tensor holds NaN or infinite values, or broken 4-bit data.
    """
    copy = _copy(
        checkpoint,
        config,
        dtype=dtype,
        quant=quant,
        folder=folder,
        least_bytes=least_bytes,
    )
    if copy is None:
        return load_weights(checkpoint, config, dtype=dtype, quant=quant)
    path, owner, structures = copy
    specs = _specs(structures)
    if path.is_file():
        with contextlib.suppress(OSError):  # a shared folder may be read-only
            os.utime(path)
        # Another process may delete it, or the disk may have damaged it.
        with contextlib.suppress(OSError, ModelError, KeyError):
            return _read(SafetensorsFile(path), structures)
    weights = stream_weights(checkpoint, config, dtype=dtype, quant=quant)
    if not _has_room(path, owner, specs):
        return dict(weights)
    return dict(_kept(weights, _Writer(path, specs)))


def files_to_load(
    checkpoint: Checkpoint,
    config: TransformerConfig,
    *,
    dtype: DType,
    quant: QuantConfig | None,
    folder: Path,
) -> tuple[Path, ...]:
    """Returns what `load_packed_weights` will read: the checkpoint's files or a copy.

    Args:
      checkpoint: The files.
      config: Of the model.
      dtype: Of weights that are not quantised.
      quant: How the others are.
      folder: Of the copies.

    Raises:
      OSError: A file of the checkpoint is gone.
    """
    copy = _copy(checkpoint, config, dtype=dtype, quant=quant, folder=folder)
    if copy is not None and copy.path.is_file():
        return (copy.path,)
    return checkpoint.weight_files


class _Copy(NamedTuple):
    """Where a copy is or would be, what its kind is called, and what it holds."""

    path: Path
    owner: str
    structures: Mapping[str, Any]


def _copy(
    checkpoint: Checkpoint,
    config: TransformerConfig,
    *,
    dtype: DType,
    quant: QuantConfig | None,
    folder: Path,
    least_bytes: int = _LEAST_BYTES,
) -> _Copy | None:
    """Returns what a copy of the checkpoint would be, None where it has none."""
    total = sum(spec.nbytes for spec in checkpoint.tensors.values())
    is_packed = bool(quantised_names(checkpoint.tensors))
    if quant is None or not quant.is_packed or is_packed or total < least_bytes:
        return None
    structures = _structures(config, dtype, quant)
    kind = (_VERSION, str(checkpoint.folder.resolve()), dtype, quant)
    owner = _hash((*kind, _specs(structures)))
    path = folder / f"{owner}-{_content(checkpoint)}.safetensors"
    return _Copy(path, owner, structures)


def _has_room(path: Path, owner: str, specs: Mapping[str, TensorSpec]) -> bool:
    """Makes room for a copy; those of older files, quantised alike, go."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in path.parent.glob(f"{owner}-*.safetensors"):
            old.unlink(missing_ok=True)
        _forget_old(path.parent)
        spared = _FREE_SHARE * shutil.disk_usage(path.parent).total
        require_space(path, sum(spec.nbytes for spec in specs.values()) + int(spared))
    except OSError:  # StorageError is one
        return False
    return True


def _forget_old(folder: Path) -> None:
    """Deletes the copies used longest ago, and what killed processes left."""
    copies = sorted(folder.glob("*.safetensors"), key=lambda p: p.stat().st_mtime)
    for path in copies[: 1 - _KEPT_COPIES]:
        path.unlink(missing_ok=True)
    remove_abandoned(folder)


class _Abandoned(Exception):
    """The weights were not read to their end."""


class _Writer(threading.Thread):
    """Holds weights and writes them at their end, which the process waits for."""

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        super().__init__(name="packed-cache")
        self._path, self._specs = path, specs
        self._items: queue.Queue[tuple[str, Any]] = queue.Queue(_IN_FLIGHT)

    def put(self, name: str, value: Any) -> None:
        """Hands a weight over; an empty name ends the file, with None it is dropped."""
        while self.is_alive():
            with contextlib.suppress(queue.Full):
                self._items.put((name, value), timeout=_WAIT_SECONDS)
                return

    def run(self) -> None:
        """Writes what has come where memory has no room for more, and at the end."""
        most = _HELD_SHARE * host_memory_bytes()
        held: dict[str, np.ndarray] = {}
        room = most
        with (
            contextlib.suppress(StorageError, _Abandoned),
            safetensors_writer(self._path, self._specs) as put,
        ):
            for key, leaf in self._all():
                held[key] = np.asarray(leaf)
                room -= leaf.nbytes
                if room < 0:
                    _put_all(held, put)
                    room = most
            _put_all(held, put)

    def _all(self) -> Iterator[tuple[str, Any]]:
        """Yields the arrays of all weights as they come.

        Raises:
          _Abandoned: The last ones will not come.
        """
        while True:
            name, value = self._items.get()
            if value is None:
                raise _Abandoned
            if not name:
                return
            yield from _leaves(name, value)


def _put_all(held: dict[str, np.ndarray], put: PutTensor) -> None:
    """Writes all arrays, and lets each of them go."""
    for key in (*held,):
        put(key, held.pop(key))


def _kept(
    weights: Iterator[tuple[str, Any]], writer: _Writer
) -> Iterator[tuple[str, Any]]:
    """Yields the weights and has each of them written."""
    writer.start()
    is_whole = False
    try:
        for name, value in weights:
            writer.put(name, value)
            yield name, value
        is_whole = True
    finally:
        writer.put("", True if is_whole else None)


def _read(file: SafetensorsFile, structures: Mapping[str, Any]) -> Weights:
    def value(name: str, structure: Any) -> Any:
        arrays = [jax.device_put(file.read(key)) for key, _ in _leaves(name, structure)]
        return jax.tree.unflatten(jax.tree.structure(structure), arrays)

    return {name: value(name, structure) for name, structure in structures.items()}


def _structures(
    config: TransformerConfig, dtype: DType, quant: QuantConfig
) -> dict[str, Any]:
    """Returns the shapes of all weights as they are held, by our names."""
    packed = wanted_format(quant, dtype)

    def structure(tensor: Tensor) -> Any:
        if tensor.is_linear and packed is not None:
            outputs, inputs = tensor.shape
            return packed.abstract((inputs, outputs))
        return jax.ShapeDtypeStruct(tensor.shape, jnp.dtype(dtype))

    return {tensor.name: structure(tensor) for tensor in checkpoint_tensors(config)}


def _specs(structures: Mapping[str, Any]) -> dict[str, TensorSpec]:
    return {
        key: TensorSpec(np.dtype(leaf.dtype), leaf.shape)
        for name, structure in structures.items()
        for key, leaf in _leaves(name, structure)
    }


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yields the arrays of a weight, or their shapes, under names of their own."""
    for index, leaf in enumerate(jax.tree.leaves(value)):
        yield f"{name}.{index}", leaf


def _content(checkpoint: Checkpoint) -> str:
    """Returns a hash that changes when the files do."""
    stats = [(path, path.stat()) for path in checkpoint.weight_files]
    files = [(path.name, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    headers = sorted((name, repr(spec)) for name, spec in checkpoint.tensors.items())
    return _hash((files, headers))


def _hash(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]
