"""A model folder in 64 digits: whether its weights are still those of before."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from conversions.hf.checkpoint import INDEX_NAME, WEIGHTS_NAME, Checkpoint
from conversions.safetensors_header import LENGTH_BYTES
from fastjax.errors import ModelError, printable

_END_BYTES = 1 << 20
_BLOCK_BYTES = 1 << 16
_BLOCKS = 64
_SAMPLED_BYTES = 2 * _END_BYTES + _BLOCKS * _BLOCK_BYTES


def folder_fingerprint(folder: Path) -> str:
    """Returns a SHA-256 that changes when the model of a folder does.

    It covers config.json, the index, and of each weight file its name, its size, its
    header and a sample of its content: the first and the last MiB and 64 blocks of
    64 KiB in equal distances; a file of at most 6 MiB is read whole. So training,
    merging or converting weights is noticed without reading gigabytes, while a change
    that keeps all sizes and lies between the blocks is not. The same weights in other
    shards have another fingerprint.

    Args:
      folder: With config.json and safetensors files.

    Raises:
      ModelError: A file is missing or broken.
      CheckpointMismatch: Index and shards disagree.
    """
    weight_files = Checkpoint(folder).weight_files
    texts = [folder / "config.json"]
    if weight_files != (folder / WEIGHTS_NAME,):
        texts.append(folder / INDEX_NAME)
    digest = hashlib.sha256()
    try:
        for path in (*texts, *weight_files):
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            for block in _sample(path):
                digest.update(block)
    except OSError as error:
        raise ModelError(
            f"the model cannot be read: {printable(error)}", where=str(folder)
        ) from error
    return digest.hexdigest()


def _sample(path: Path) -> Iterator[bytes]:
    """Yields the whole of a text or a small file, else its header and some blocks."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _SAMPLED_BYTES or path.suffix == ".json":
            yield file.read()
            return
        header_end = LENGTH_BYTES + int.from_bytes(file.read(LENGTH_BYTES), "little")
        file.seek(0)
        yield file.read(max(_END_BYTES, header_end))
        for number in range(1, _BLOCKS + 1):
            file.seek((size - _BLOCK_BYTES) * number // (_BLOCKS + 1))
            yield file.read(_BLOCK_BYTES)
        file.seek(size - _END_BYTES)
        yield file.read()
