"""Checkpoints: a folder appears under its name only when it is whole.

`state/` (Orbax) is the one source of the weights that a resumed run continues with:
it keeps every array in its own dtype, also where an adapter file would not and where
full fine-tuning has none. The adapter beside it is for readers elsewhere.
"""

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from fastjax import files
from fastjax.errors import CheckpointMismatch, ModelError, printable
from fastjax.train import faults, manifest
from fastjax.train.state import TrainState

WriteWeights = Callable[[Path, PyTree], None]
RECORD_NAME = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints(output_dir: Path) -> list[Path]:
    """Returns the folders that look like checkpoints, in order of their steps."""
    found = (path for path in output_dir.iterdir() if _NAME.fullmatch(path.name))
    return sorted((path for path in found if path.is_dir()), key=step_of)


def step_of(folder: Path) -> int:
    """Returns the step that the name of a checkpoint says, -1 for another name."""
    match = _NAME.fullmatch(folder.name)
    return int(match.group(1)) if match else -1


def name_of(step: int) -> str:
    """Returns the name of the checkpoint of a step."""
    return f"checkpoint-{step:06d}"


def save(
    output_dir: Path,
    state: TrainState,
    record: Mapping[str, Any],
    *,
    step: int,
    write_adapter: WriteWeights | None,
    keep: int,
    also_keep: int | None = None,
) -> Path:
    """Returns the new checkpoint's folder, which is on the disk and verified.

    Older checkpoints are deleted only afterwards, so that one whole checkpoint exists
    at every moment.

    Args:
      output_dir: Of the run.
      state: Everything that changes from step to step.
      record: What else the run continues from; JSON.
      step: Steps done.
      write_adapter: Writes the adapter into a folder; None leaves it out.
      keep: Newest checkpoints that stay.
      also_keep: Step of one that stays beside them.

    Raises:
      StorageError: Nothing of the new checkpoint is left, the old ones are intact.
    """
    folder = output_dir / name_of(step)
    aside = output_dir / files.temporary_name(folder.name)
    arrays = named_arrays(state)
    with files.storage_errors(f"save {folder.name}", output_dir):
        _require_space(output_dir, arrays)
        with _removed_on_failure(aside):
            aside.mkdir()
            if write_adapter is not None:
                write_adapter(aside, state.trainable)
            faults.hit("save:after_adapter", step)
            _write_arrays(aside / "state", arrays)
            faults.hit("save:after_state", step)
            full = {**record, "step": step, "arrays": _descriptions(arrays)}
            (aside / RECORD_NAME).write_text(files.dump_json(full), encoding="utf-8")
            files.settle(aside)
            manifest.write_manifest(aside)
            faults.hit("save:after_manifest", step, aside)
            files.rename(aside, folder)
        faults.hit("save:after_rename", step, folder)
        rotate(output_dir, keep, step, also_keep)
    return folder


def rotate(output_dir: Path, keep: int, step: int, also_keep: int | None) -> None:
    """Deletes all checkpoints but the newest `keep` and the one of `also_keep`.

    Half a deletion leaves no name.
    """
    for folder in checkpoints(output_dir)[:-keep]:
        if step_of(folder) == also_keep:
            continue
        doomed = output_dir / files.temporary_name(folder.name)
        files.rename(folder, doomed)
        faults.hit("save:before_delete", step)
        shutil.rmtree(doomed)


def affordable(
    output_dir: Path, state: TrainState, keep: int, note: Callable[[str], None]
) -> int:
    """Returns how many checkpoints the disk has room for, at most `keep`.

    One more than are kept exists while a new one is written.

    Raises:
      StorageError: There is room for none.
    """
    arrays = named_arrays(state)
    _require_space(output_dir, arrays)
    # Two copies of what trains: the adapter, and the state.
    need = _bytes_of(arrays) + _bytes_of(named_arrays(state.trainable))
    there = sum(
        path.stat().st_size
        for folder in checkpoints(output_dir)
        for path in files.files_below(folder)
    )
    room = int((files.free_bytes(output_dir) + there) // max(need, 1)) - 1
    if room >= keep:
        return keep
    size = files.mebibytes(need)
    if room < 1:
        note(
            f"the disk has room for one checkpoint of {size}: while that is kept a "
            "second one cannot be saved; free some space"
        )
        return 1
    note(
        f"the disk has room for {room} of the {keep} checkpoints that may be kept, of "
        f"{size} each: so many are kept, not save_total_limit={keep}"
    )
    return room


def read_record(folder: Path) -> dict[str, Any]:
    """Returns what `save` was given as record, with the step.

    Raises:
      ModelError: The file is broken, or not of a checkpoint.
    """
    record = files.read_json(folder / RECORD_NAME)
    if not isinstance(record.get("step"), int):
        raise ModelError(f"{RECORD_NAME} has no step", where=str(folder))
    return record


def require_fitting(folder: Path, like: TrainState, record: Mapping[str, Any]) -> None:
    """Returns when the saved arrays have the names, shapes and dtypes of `like`.

    Args:
      folder: A verified checkpoint.
      like: Arrays, or their shapes and dtypes.
      record: From `read_record`.

    Raises:
      CheckpointMismatch: Names, shapes or dtypes differ.
    """
    wanted = _descriptions(named_arrays(like))
    _require_equal(wanted, record.get("arrays", {}), folder)


def read_state(folder: Path, like: TrainState, record: Mapping[str, Any]) -> TrainState:
    """Returns the saved state, bit for bit, in the structure of `like`.

    Its arrays come by way of the host, so that the device never holds two of one. They
    are on the default device and committed to none, as those of a fresh run: a step of
    committed arrays is another program, which would be compiled again.

    Args:
      folder: A verified checkpoint.
      like: Arrays, or their shapes and dtypes, which need no memory; in host memory
        where those of the result shall be.
      record: From `read_record`.

    Raises:
      CheckpointMismatch: Names, shapes or dtypes differ from those of `like`.
    """
    require_fitting(folder, like, record)
    wanted = named_arrays(like)
    on_host = ocp.RestoreArgs(restore_type=np.ndarray)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        arrays = checkpointer.restore(
            (folder / "state").absolute(),
            args=ocp.args.PyTreeRestore(
                item=wanted, restore_args=dict.fromkeys(wanted, on_host)
            ),
        )
    leaves = [_placed(arrays.pop(name), leaf.sharding) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _placed(array: np.ndarray, place: jax.sharding.Sharding | None) -> jax.Array:
    is_on_host = place is not None and place.memory_kind == "pinned_host"
    return jax.device_put(array, place) if is_on_host else jnp.array(array)


def named_arrays(tree: PyTree) -> dict[str, Any]:
    """Returns the leaves of a tree by their paths, in the order of the tree."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in leaves
    }


def _write_arrays(folder: Path, arrays: dict[str, Any]) -> None:
    # What the device has failed to compute is no fault of the disk.
    jax.block_until_ready(arrays)
    # A full disk reaches us as a ValueError of the storage engine, logged at length.
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(arrays))
    except jax.errors.JaxRuntimeError:
        raise
    except (ValueError, RuntimeError) as error:
        text, place = str(error), folder.parent
        is_full = any(os.strerror(number) in text for number in files.DISK_FULL)
        raise files.storage_error(
            "save state", place, text[-160:], is_full=is_full
        ) from error
    finally:
        log.setLevel(level)


def _require_space(output_dir: Path, arrays: Mapping[str, Any]) -> None:
    need = _bytes_of(arrays)
    if files.free_bytes(output_dir) < need:
        reason = f"it needs {files.mebibytes(need)}"
        raise files.storage_error("save a checkpoint", output_dir, reason, is_full=True)


def _bytes_of(arrays: Mapping[str, Any]) -> int:
    return sum(array.nbytes for array in arrays.values())


@contextlib.contextmanager
def _removed_on_failure(folder: Path) -> Iterator[None]:
    is_whole = False
    try:
        yield
        is_whole = True
    finally:
        if not is_whole:
            shutil.rmtree(folder, ignore_errors=True)


def _descriptions(arrays: Mapping[str, Any]) -> dict[str, str]:
    return {
        name: f"{np.dtype(array.dtype).name}{list(array.shape)}"
        for name, array in arrays.items()
    }


def _require_equal(
    wanted: Mapping[str, str], saved: Mapping[str, str], folder: Path
) -> None:
    names = sorted(n for n in {*wanted, *saved} if wanted.get(n) != saved.get(n))
    if not names:
        return
    rows = [
        f"{printable(n)}: saved {printable(saved.get(n, 'nothing'))}, "
        f"wanted {wanted.get(n, 'nothing')}"
        for n in names[:10]
    ]
    more = [f"and {len(names) - 10} more"] if len(names) > 10 else []
    raise CheckpointMismatch(
        f"{len(names)} arrays of the checkpoint do not fit this run",
        where="\n         ".join([str(folder), *rows, *more]),
        fix="use the settings it was saved with, or another output_dir",
    )
