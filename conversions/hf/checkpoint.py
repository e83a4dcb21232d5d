"""The safetensors files of a model folder, as one set of tensors."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from conversions.safetensors_file import SafetensorsFile
from conversions.safetensors_header import TensorSpec
from conversions.strict_json import read_json_object
from fastjax.errors import CheckpointMismatch, ModelError, printable

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_INDEX_BYTES = 64_000_000

_SHOWN = 10
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class Checkpoint:
    """Tensors of a Hugging Face model folder: one file, or shards and their index.

    Attributes:
      folder: The model folder.
      tensors: Dtype and shape of each tensor by name, in the order of the files.
    """

    folder: Path
    tensors: Mapping[str, TensorSpec]

    def __init__(self, folder: Path) -> None:
        """Reads and checks index and headers; no tensor is read.

        Raises:
          ModelError: A file is missing, broken, or leads out of the folder.
          CheckpointMismatch: Index and shards disagree about which tensors exist.
        """
        self.folder = folder
        if (folder / WEIGHTS_NAME).exists():
            shards = {WEIGHTS_NAME: None}
        elif (folder / INDEX_NAME).exists():
            shards = _shards(folder / INDEX_NAME)
        else:
            raise _no_weights(folder)
        self._files: dict[str, SafetensorsFile] = {}
        for shard, names in shards.items():
            file = SafetensorsFile(_inside(folder, shard))
            if names is not None:
                _check_shard(folder / shard, names, set(file.tensors))
            self._files.update(dict.fromkeys(file.tensors, file))
        self.tensors = {n: file.tensors[n] for n, file in self._files.items()}

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The files that hold tensors, in order of name."""
        return tuple(sorted({file.path for file in self._files.values()}))

    def read(self, name: str) -> np.ndarray:
        """Returns a read-only view of one tensor; pages come in when touched."""
        return self._files[name].read(name)


def _shards(path: Path) -> dict[str, set[str]]:
    """Returns the tensors that the index expects in each shard."""
    index = read_json_object(path, limit_bytes=MAX_INDEX_BYTES)
    where = str(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(
            "weight_map must be an object of tensor names and shard names",
            where=where,
            fix="download the index again",
        )
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if not _is_basename(shard):
            raise ModelError(
                f"weight_map[{printable(name)}]={printable(repr(shard))} must be the "
                "name of a .safetensors file in the same folder",
                where=where,
                fix="do not trust this folder; download the model from its author",
            )
        shards.setdefault(shard, set()).add(name)
    return dict(sorted(shards.items()))


def _is_basename(shard: object) -> bool:
    if not isinstance(shard, str) or not shard.endswith(".safetensors"):
        return False
    has_path = any(mark in shard for mark in "/\\:") or shard.startswith(".")
    return shard.isprintable() and not has_path and len(shard) < 256


def _inside(folder: Path, shard: str) -> Path:
    """Returns the path of a shard that does not lead out of the folder.

    The hub's cache is allowed: snapshots/<commit>/<file> links to blobs/<hash>.
    """
    path = folder / shard
    if not path.is_file():
        raise ModelError(
            f"{shard} is missing",
            where=str(folder),
            fix="download the model again; hf download NAME continues where it stopped",
        )
    home, target = folder.resolve(), path.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if not any(target.is_relative_to(root) for root in allowed):
        raise ModelError(
            f"{shard} is a link that leaves the model folder",
            where=str(folder),
            fix="copy the file itself into the folder",
        )
    return path


def _check_shard(path: Path, listed: set[str], stored: set[str]) -> None:
    lines = [
        f"{kind}: {', '.join(printable(name) for name in sorted(names)[:_SHOWN])}"
        + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        for kind, names in (
            ("the index lists tensors that the shard lacks", listed - stored),
            ("the shard has tensors that the index puts elsewhere", stored - listed),
        )
        if names
    ]
    if lines:
        raise CheckpointMismatch(
            "; ".join(lines), where=str(path), fix="download index and shard again"
        )


def _no_weights(folder: Path) -> ModelError:
    if not folder.is_dir():
        return ModelError("this model folder does not exist", where=str(folder))
    pickles = sorted(
        path.name
        for path in folder.iterdir()
        if path.suffix in _PICKLES or path.name.endswith(".bin.index.json")
    )
    if pickles:
        return ModelError(
            f"the weights are pickles ({printable(pickles[0])}); loading them could "
            "run code, so only safetensors are read",
            where=str(folder),
            fix="load and save the model once with transformers in an isolated "
            "environment (save_pretrained writes safetensors), or use a revision "
            "that has *.safetensors",
        )
    return ModelError(
        f"no weights: neither {WEIGHTS_NAME} nor {INDEX_NAME} is there",
        where=str(folder),
        fix="download the whole model: hf download NAME",
    )
