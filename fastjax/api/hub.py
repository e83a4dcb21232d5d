"""Uploads of results: an explicit step, and the only one that sends anything."""

from pathlib import Path
from typing import Any

from fastjax.errors import ConfigError, EnvironmentFault, ModelError, printable

# What a run keeps for itself: state to resume from, logs that name local places.
_KEPT_BACK = (
    "checkpoint-*",
    ".*",
    "*.broken",
    "*.old",
    "tensorboard/*",
    "wandb/*",
    "nan_batch.jsonl",
    "samples.jsonl",
)
_RESULTS = ("adapter_config.json", "model/config.json", "config.json")


def push_folder(folder: Path, repo_id: str, *, private: bool = False) -> str:
    """Returns the address that a result was uploaded to.

    The adapter or model, its card, settings and metrics go; checkpoints stay here.

    Args:
      folder: Of a finished run, or of a merged model.
      repo_id: Repository, such as me/my-adapter; made if it is new.
      private: Make a new one private.

    Raises:
      ModelError: The folder holds no result.
      ConfigError: The hub refuses the name.
      EnvironmentFault: No network, no token, or no right to write there.
    """
    result = next((name for name in _RESULTS if (folder / name).is_file()), None)
    if result is None:
        raise ModelError(
            "the folder holds neither an adapter nor a model",
            where=str(folder),
            fix="give the output folder of a finished run, or a merged model",
        )
    # Late: it reads its settings when it is imported.
    import huggingface_hub
    from huggingface_hub.errors import (
        HFValidationError,
        HTTPError,  # pyright: ignore[reportPrivateImportUsage] - its client's
        OfflineModeIsEnabled,
    )

    source = folder / Path(result).parent
    api: Any = huggingface_hub.HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=source,
            ignore_patterns=list(_KEPT_BACK),
            commit_message="Upload with fastjax",
        )
    except HFValidationError as error:
        raise ConfigError(
            f"hub_model_id={printable(repo_id)} is no name of a repository",
            fix="write OWNER/NAME",
        ) from error
    except OfflineModeIsEnabled as error:
        raise EnvironmentFault(
            "HF_HUB_OFFLINE is set: nothing can be uploaded",
            fix="unset it, or copy the folder yourself",
        ) from error
    except (OSError, HTTPError) as error:
        raise EnvironmentFault(
            f"the hub did not take the upload: {printable(error)}",
            where=repo_id,
            fix="check the network, and `hf auth login` with a token that may write "
            f"there; the result is in {folder}: "
            f"`fastjax push --folder {folder} --hub_model_id {repo_id}`",
            code="FJ-ENV-HUB",
        ) from error
    return f"https://huggingface.co/{repo_id}"
