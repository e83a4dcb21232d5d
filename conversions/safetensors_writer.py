"""Writes safetensors files tensor by tensor, in any order."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from conversions.safetensors_header import TensorSpec, render_header
from fastjax.files import new_file

PutTensor = Callable[[str, np.ndarray], None]


@contextlib.contextmanager
def safetensors_writer(
    path: Path,
    specs: Mapping[str, TensorSpec],
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[PutTensor]:
    """Yields a function that puts one tensor into its place in the new file.

    Args:
      path: Final name of the file; it appears when every tensor is written.
      specs: Dtype and shape of each tensor; `begin` is not used.
      metadata: Notes beside the tensors.

    Raises:
      ValueError: A tensor is unknown, of another dtype or shape, or was not put.
      StorageError: The file cannot be written.
    """
    header, places = render_header(specs, metadata)
    missing = set(specs)
    with new_file(path) as file:
        file.write(header)

        def put(name: str, array: np.ndarray) -> None:
            spec = specs[name]
            if array.dtype != spec.dtype or array.shape != spec.shape:
                raise ValueError(
                    f"{name} is {array.dtype}{array.shape}, the file has a place for "
                    f"{spec.dtype}{spec.shape}"
                )
            file.seek(places[name])
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            missing.discard(name)

        yield put
        if missing:
            raise ValueError(f"{path.name} lacks tensors: {sorted(missing)[:10]}")


def write_safetensors(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Writes a small safetensors file whose tensors are all at hand."""
    specs = {name: TensorSpec(a.dtype, a.shape) for name, a in tensors.items()}
    with safetensors_writer(path, specs, metadata) as put:
        for name, array in tensors.items():
            put(name, array)
