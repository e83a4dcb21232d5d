"""From a name to folders: presets, folders, hub names, adapters and their bases."""

import dataclasses
import difflib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from conversions.hf import read_config, resolve
from conversions.peft import read_adapter_config
from fastjax import runtime
from fastjax.api.random_checkpoint import random_checkpoint_of
from fastjax.errors import ModelError, printable
from fastjax.files import user_path
from fastjax.models.registry import PRESETS
from fastjax.train.checkpoint import checkpoints
from fastjax.train.publish import RUN_FILE, is_published

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ADAPTER_CONFIG = "adapter_config.json"
# What transformers raises for files that are not what they should be.
_BROKEN_FILES = (OSError, ValueError, KeyError, TypeError, AttributeError)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FoundModel:
    """Where a model lies.

    Attributes:
      name: Hub name or folder of the base model, as adapters record it.
      folder: Local folder of the base model.
      adapter: Folder of the adapter on it; None without one.
    """

    name: str
    folder: Path
    adapter: Path | None

    @property
    def tokenizer_folders(self) -> tuple[Path, ...]:
        """Folders that may hold the tokenizer, the preferred one first."""
        return (self.folder,) if self.adapter is None else (self.adapter, self.folder)


def find_model(
    name: str, *, revision: str = "main", with_weights: bool = True
) -> FoundModel:
    """Returns where the model of a preset, folder or hub name lies.

    Without weights only configuration and tokenizer of a hub model are downloaded.

    Raises:
      FastJaxError: It cannot be found; says why.
    """
    _require_no_mistyped_folder(name)
    folder, source_name = _folder(name, revision, with_weights=with_weights)
    adapter = folder if (folder / ADAPTER_CONFIG).is_file() else None
    if adapter is not None:
        folder, source_name = _base_of(adapter, with_weights=with_weights)
    return FoundModel(name=source_name, folder=folder, adapter=adapter)


def load_tokenizer(*folders: Path) -> "PreTrainedTokenizerBase | None":
    """Returns the tokenizer of the first folder that has one.

    Raises:
      ModelError: Its files, or the model's configuration, cannot be read.
    """
    # Late, so that `runtime.configure` comes first: transformers reads its settings.
    with runtime.without_torch():
        from transformers import AutoTokenizer

    for folder in folders:
        if not (folder / "tokenizer_config.json").is_file():
            continue
        try:
            # Said aloud: without it transformers asks whether to run the folder's code.
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (*_BROKEN_FILES, ImportError) as error:
            if (folder / "config.json").is_file():
                read_config(folder)  # transformers reads it too, and fails by it
            raise ModelError(
                f"the tokenizer cannot be read: {printable(error)}",
                where=str(folder),
                fix="download tokenizer.json and tokenizer_config.json again",
            ) from error
    return None


def _require_no_mistyped_folder(name: str) -> None:
    """Raises `ModelError` if a path's last part is not in the folder before it.

    Such a path may look like a hub name; those of the presets are taken for that.
    """
    path = user_path(name)
    is_hub_id = any(preset.hub_id == name for preset in PRESETS.values())
    if "/" not in name or is_hub_id or os.path.exists(path):
        return
    if not os.path.isdir(path.parent):
        return
    names = sorted(entry.name for entry in path.parent.iterdir() if entry.is_dir())
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    listed = ", ".join(printable(near, 60) for near in close or names[:5])
    looks_like_hub_name = not path.is_absolute() and len(path.parts) == 2
    hub = "; if a hub name is meant, run it where no folder is called as its owner"
    raise ModelError(
        f"{printable(name)}: there is no such folder",
        where=printable(path.parent),
        fix=f"check the path; {'nearest names' if close else 'beside it'}: "
        f"{listed or 'nothing'}{hub * looks_like_hub_name}",
    )


def _folder(name: str, revision: str, *, with_weights: bool) -> tuple[Path, str]:
    """Returns the local folder of a name, and the name that adapters record."""
    found = PRESETS.get(name.lower())
    if found is None and "/" not in name and not os.path.exists(name):
        near = difflib.get_close_matches(name.lower(), PRESETS, n=3)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise ModelError(
            f"{printable(name)} is neither a preset nor a folder",
            fix=f"{hint}`fastjax models` lists the presets; a name of the hub has an "
            "owner, as in Qwen/Qwen2.5-0.5B",
        )
    if found is None or os.path.isdir(name):
        folder = resolve(
            name, revision=revision, known_names=PRESETS, with_weights=with_weights
        )
        if not os.path.isdir(name):
            return folder, name
        folder = _model_in(folder)
        return folder, str(folder.resolve())
    if found.hub_id is None:
        folder = random_checkpoint_of(name.lower())
        return folder, str(folder)
    folder = resolve(found.hub_id, revision=revision, with_weights=with_weights)
    return folder, found.hub_id


def _model_in(folder: Path) -> Path:
    """Returns the folder, or in that of a finished full fine-tuning the model's.

    Raises:
      ModelError: It is that of an unfinished run, or holds no model.
    """
    if any((folder / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
        return folder
    is_over = not (folder / RUN_FILE).is_file() or is_published(folder)
    if is_over and (folder / "model" / "config.json").is_file():
        return folder / "model"
    saved = checkpoints(folder)
    if saved:
        raise ModelError(
            "the run of this folder is not finished: it has no model or adapter yet",
            where=str(folder),
            fix="give its command again, which goes on, or take its newest "
            f"checkpoint: {saved[-1]}",
        )
    raise ModelError(
        "the folder holds no model: neither config.json nor an adapter",
        where=str(folder),
        fix="give the folder of a model, of an adapter or of a finished run",
    )


def _base_of(adapter: Path, *, with_weights: bool) -> tuple[Path, str]:
    """Returns folder and recorded name of the base model of an adapter folder."""
    recorded = read_adapter_config(adapter)
    name = recorded.base_model_name_or_path
    if not name:
        raise ModelError(
            "the adapter does not say which base model it belongs to",
            where=str(adapter / ADAPTER_CONFIG),
            fix="add base_model_name_or_path to that file",
        )
    if os.path.isabs(name) and not os.path.isdir(name):
        raise ModelError(
            f"the base model of this adapter is gone: {printable(name)}",
            where=str(adapter / ADAPTER_CONFIG),
            fix="write the folder that has it now, or its hub name, as "
            "base_model_name_or_path into that file",
        )
    revision = recorded.revision or "main"
    return _folder(name, revision, with_weights=with_weights)[0], name
