"""`fastjax push`: a result to the Hugging Face hub."""

import dataclasses
import sys
from pathlib import Path

from fastjax.cli_flags import Call, parsed


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PushArgs:
    """Uploads an adapter or a model to the Hugging Face hub.

    Attributes:
      folder: Folder of a finished run, or of a merged model.
      hub_model_id: Repository, such as me/my-adapter; made if it is new.
      hub_private_repo: Make a new one private.
    """

    folder: str = dataclasses.field(metadata={"positional": True})
    hub_model_id: str
    hub_private_repo: bool = False


def run(call: Call) -> None:
    """Uploads and prints the address."""
    args = parsed(PushArgs, call)
    from fastjax.api import push_folder

    address = push_folder(
        Path(args.folder), args.hub_model_id, private=args.hub_private_repo
    )
    sys.stdout.write(f"{address}\n")
