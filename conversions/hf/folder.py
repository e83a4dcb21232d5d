"""A model's name -> a local folder: a path, or a download from the Hugging Face hub."""

import difflib
import os
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage] - httpx or its successor
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from fastjax.errors import EnvironmentFault, FastJaxError, ModelError, printable
from fastjax.files import user_path

ALLOWED = (
    "model*.safetensors",
    "adapter_model.safetensors",
    "*.json",
    "*.jinja",
    "tokenizer.model",
    "merges.txt",
)
WEIGHTS = ("*.safetensors",)
IGNORED = ("original/*", "onnx/*", "checkpoint-*/*")


def resolve(
    name_or_path: str,
    *,
    revision: str = "main",
    known_names: Iterable[str] = (),
    with_weights: bool = True,
) -> Path:
    """Returns the local folder of a model, downloading it if it is a hub name.

    Obeys `HF_HUB_OFFLINE`, `HF_HOME` and `HF_TOKEN`; continues broken downloads.

    Args:
      name_or_path: Folder, or hub name such as "Qwen/Qwen2.5-0.5B".
      revision: Branch, tag or commit on the hub.
      known_names: Names to suggest when there is no such model.
      with_weights: False downloads configuration and tokenizer alone.

    Raises:
      ModelError: There is no such folder, model or revision.
      EnvironmentFault: Network, token, licence or cache is in the way.
    """
    path = user_path(name_or_path)
    if os.path.isdir(path):
        return path
    if os.path.exists(path):
        raise ModelError(
            f"{printable(name_or_path)} is a file; a model is a folder",
            fix=f"give the folder: {printable(path.parent)}",
        )
    if _looks_like_path(name_or_path):
        raise _unknown(name_or_path, "there is no such folder", known_names)
    try:
        return Path(
            snapshot_download(
                name_or_path,
                revision=revision,
                allow_patterns=list(ALLOWED),
                ignore_patterns=[*IGNORED, *([] if with_weights else WEIGHTS)],
            )
        )
    except HFValidationError as error:
        reason = "this is neither a folder nor a hub name"
        raise _unknown(name_or_path, reason, known_names) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, HTTPError) as error:
        raise _explained(error, name_or_path, revision, known_names) from error


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "~", os.sep)) or "\\" in name or name.count("/") > 1


def _explained(
    error: Exception, name: str, revision: str, known_names: Iterable[str]
) -> FastJaxError:
    where = f"huggingface.co/{name}"
    download = f"hf download {name} --revision {revision}"
    licence = f"if it is gated, first accept its licence at https://{where} and run: "
    licence += "hf auth login"
    if isinstance(error, GatedRepoError):
        return EnvironmentFault(
            f"{name} is gated: its licence must be accepted, and a token is needed",
            where=where,
            fix=f"accept the licence at https://huggingface.co/{name}, then run: "
            "hf auth login",
        )
    if isinstance(error, RevisionNotFoundError):
        return ModelError(
            f"{name} has no revision {printable(revision)}",
            where=where,
            fix=f"see https://huggingface.co/{name}/tree/main for those it has",
        )
    if isinstance(error, RepositoryNotFoundError):
        reason = "there is no such model on the hub, or it is private"
        return _unknown(name, reason, known_names)
    if constants.is_offline_mode():
        return EnvironmentFault(
            f"{name} is not in the cache, and the hub is off (HF_HUB_OFFLINE)",
            where=str(constants.HF_HUB_CACHE),
            fix=f"run once with a network: {download}; {licence}",
        )
    reason = printable(next(iter(str(error).splitlines()), type(error).__name__))
    is_answer = isinstance(error.__cause__, HfHubHTTPError)
    if isinstance(error, LocalEntryNotFoundError) and not is_answer:
        return EnvironmentFault(
            f"the Hugging Face hub cannot be reached, and {name} is neither a folder "
            "nor in the cache",
            where=f"{where}: {reason.removeprefix('Got: ')}",
            fix="check the network and HF_ENDPOINT; or copy the model's folder here "
            f"from a machine with a network ({download} --local-dir FOLDER) and give "
            "--model FOLDER; --model tiny needs neither",
        )
    return EnvironmentFault(
        f"there is no folder {name}; as a hub name it cannot be downloaded: {reason}",
        where=where,
        fix=f"check network and disk, then continue with: {download}; {licence}",
    )


def _unknown(name: str, reason: str, known_names: Iterable[str]) -> ModelError:
    near = difflib.get_close_matches(name, list(known_names), n=3)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    return ModelError(
        f"{printable(name)}: {reason}",
        fix=f"{hint}Give a folder, or a hub name such as Qwen/Qwen2.5-0.5B; for a "
        "private model run: hf auth login",
    )
