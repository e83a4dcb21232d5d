"""From a name to a `LanguageModel`: presets, folders, hub names and adapter folders."""

import difflib
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from conversions.hf import Checkpoint, load_weights, read_config, resolve
from conversions.peft import read_adapter, read_adapter_config
from fastjax import lora as adapters
from fastjax import runtime
from fastjax.api.language_model import LanguageModel, ModelSource
from fastjax.api.random_checkpoint import random_checkpoint_of
from fastjax.config import DType, Implementations, LoRAConfig, QuantConfig
from fastjax.errors import ModelError, printable
from fastjax.models.build import DecoderSpec, build_decoder
from fastjax.models.registry import PRESETS
from fastjax.quantize import packed_formats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ADAPTER_CONFIG = "adapter_config.json"
# What transformers raises for files that are not what they should be.
_BROKEN_FILES = (OSError, ValueError, KeyError, TypeError, AttributeError)


def load_model(
    name: str,
    *,
    revision: str = "main",
    dtype: DType = "bfloat16",
    quant: QuantConfig | None = None,
    full_finetuning: bool = False,
    implementations: Implementations | None = None,
    max_seq_length: int = 2048,
) -> LanguageModel:
    """Returns the model of a preset, folder or hub name, ready to run.

    An adapter folder gives its base model with the adapter on it.

    Args:
      name: Preset name, folder or hub name.
      revision: Branch, tag or commit of a hub model.
      dtype: Of activations, and of weights that stay in 16 bits.
      quant: Whether and how weights become 4-bit; None keeps them dense.
      full_finetuning: Every weight trains, as float32.
      implementations: Implementation of each op; None takes the first able one.
      max_seq_length: Longest row that training uses, in tokens.

    Raises:
      FastJaxError: The model cannot be found, read or held; says why.
    """
    runtime.configure()
    folder, source_name = _folder(name, revision)
    adapter = folder if (folder / _ADAPTER_CONFIG).is_file() else None
    if adapter is not None:
        folder, source_name = _base_of(adapter)
    config = read_config(folder)
    param_dtype = "float32" if full_finetuning else dtype
    weights = load_weights(Checkpoint(folder), config, dtype=param_dtype, quant=quant)
    spec = DecoderSpec(
        config=config,
        param_dtype=param_dtype,
        compute_dtype=dtype,
        trains_weights=full_finetuning,
        packed=packed_formats(weights),
        implementations=implementations or Implementations(),
    )
    model = LanguageModel(
        build_decoder(spec, weights),
        spec,
        source=ModelSource(name=source_name, folder=folder, revision=_commit(folder)),
        tokenizer=load_tokenizer(adapter or folder, folder),
        max_seq_length=max_seq_length,
    )
    if adapter is not None:
        _put_adapter(model, adapter)
    return model


def add_adapter(model: LanguageModel, lora: LoRAConfig, *, seed: int) -> None:
    """Gives the model fresh adapters; those it had are dropped."""
    adapted = adapters.adapted_spec(adapters.plain_spec(model.spec), lora)
    model.decoder = adapters.with_adapters(
        model.decoder, model.spec, adapted, jax.random.key(seed)
    )
    model.spec, model.lora = adapted, lora


def load_tokenizer(*folders: Path) -> "PreTrainedTokenizerBase | None":
    """Returns the tokenizer of the first folder that has one.

    Raises:
      ModelError: Its files cannot be read.
    """
    # Late, so that `runtime.configure` comes first: transformers reads its settings.
    from transformers import AutoTokenizer

    for folder in folders:
        if not (folder / "tokenizer_config.json").is_file():
            continue
        try:
            # Said aloud: without it transformers asks whether to run the folder's code.
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (*_BROKEN_FILES, ImportError) as error:
            raise ModelError(
                f"the tokenizer cannot be read: {printable(error)}",
                where=str(folder),
                fix="download tokenizer.json and tokenizer_config.json again",
            ) from error
    return None


def _folder(name: str, revision: str) -> tuple[Path, str]:
    """Returns the local folder of a name, and the name that adapters record."""
    found = PRESETS.get(name.lower())
    if found is None and "/" not in name and not Path(name).exists():
        near = difflib.get_close_matches(name.lower(), PRESETS, n=3)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise ModelError(
            f"{printable(name)} is neither a preset nor a folder",
            fix=f"{hint}`fastjax models` lists the presets; a name of the hub has an "
            "owner, as in Qwen/Qwen2.5-0.5B",
        )
    if found is None or Path(name).is_dir():
        folder = resolve(name, revision=revision, known_names=PRESETS)
        return folder, str(folder.resolve()) if Path(name).is_dir() else name
    if found.hub_id is None:
        folder = random_checkpoint_of(name.lower())
        return folder, str(folder)
    return resolve(found.hub_id, revision=revision), found.hub_id


def _base_of(adapter: Path) -> tuple[Path, str]:
    """Returns folder and recorded name of the base model of an adapter folder."""
    recorded = read_adapter_config(adapter)
    name = recorded.base_model_name_or_path
    if not name:
        raise ModelError(
            "the adapter does not say which base model it belongs to",
            where=str(adapter / _ADAPTER_CONFIG),
            fix="add base_model_name_or_path to that file",
        )
    return _folder(name, recorded.revision or "main")[0], name


def _commit(folder: Path) -> str | None:
    """Returns the commit that a folder of the hub's cache holds."""
    return folder.name if folder.parent.name == "snapshots" else None


def _put_adapter(model: LanguageModel, folder: Path) -> None:
    adapter = read_adapter(folder, model.config)
    add_adapter(model, adapter.lora, seed=0)
    adapters.set_adapter_weights(model.decoder, model.spec, adapter.weights)
