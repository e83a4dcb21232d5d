"""From a name to a `LanguageModel`: presets, folders, hub names and adapter folders."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from conversions.hf import (
    Checkpoint,
    files_to_load,
    load_packed_weights,
    read_config,
)
from conversions.peft import grown_config, read_adapter
from fastjax import lora as adapters
from fastjax import runtime
from fastjax.api.finding import FoundModel, find_model, load_tokenizer
from fastjax.api.language_model import LanguageModel, ModelSource
from fastjax.api.starting import start_from_loss
from fastjax.api.vocabulary import resize_token_embeddings
from fastjax.config import (
    DType,
    Implementations,
    LoRAConfig,
    QuantConfig,
    RopeScaling,
    TrainConfig,
)
from fastjax.errors import ConfigError, ModelError
from fastjax.models.build import DecoderSpec, build_decoder
from fastjax.models.transformer_config import TransformerConfig
from fastjax.quantize import packed_formats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_model(
    name: str,
    *,
    revision: str = "main",
    dtype: DType = "bfloat16",
    quant: QuantConfig | None = None,
    full_finetuning: bool = False,
    implementations: Implementations | None = None,
    max_seq_length: int = 2048,
    rope_scaling: RopeScaling = "none",
) -> LanguageModel:
    """Returns the model of a preset, folder or hub name, ready to run.

    An adapter folder gives its base model with the adapter on it.

    Args:
      name: Preset name, folder or hub name.
      revision: Branch, tag or commit of a hub model.
      dtype: Of activations, and of weights that stay in 16 bits.
      quant: Whether and how weights are packed; None keeps them dense.
      full_finetuning: Every weight trains, as float32.
      implementations: Implementation of each op; None takes the first able one.
      max_seq_length: Longest row that training uses, in tokens.
      rope_scaling: How RoPE is stretched where that is beyond the context.

    Raises:
      FastJaxError: The model cannot be found, read or held; says why.
    """
    runtime.configure()
    found = find_model(name, revision=revision)
    _require_no_adapter(found, full_finetuning=full_finetuning)
    folder, adapter = found.folder, found.adapter
    base = read_config(folder)
    config = base if adapter is None else _config_of_adapter(adapter, base)
    param_dtype = "float32" if full_finetuning else dtype
    copies = _packed_folder()
    weights = load_packed_weights(
        Checkpoint(folder), config, dtype=param_dtype, quant=quant, folder=copies
    )
    spec = DecoderSpec(
        config=config.stretched(rope_scaling, max_seq_length),
        param_dtype=param_dtype,
        compute_dtype=dtype,
        trains_weights=full_finetuning,
        packed=packed_formats(weights),
        implementations=implementations or Implementations(),
    )
    model = LanguageModel(
        build_decoder(spec, weights),
        spec,
        source=ModelSource(
            name=found.name, folder=folder, config=base, revision=_commit(folder)
        ),
        tokenizer=load_tokenizer(*found.tokenizer_folders),
        max_seq_length=max_seq_length,
    )
    if adapter is not None:
        _put_adapter(model, adapter)
    return model


def find_files(config: TrainConfig) -> FoundModel:
    """Returns where a run's model is, without its weights.

    Raises:
      FastJaxError: The model cannot be found, or is an adapter where all weights train.
    """
    name, revision = config.model, config.model_revision
    found = find_model(name, revision=revision, with_weights=False)
    _require_no_adapter(found, full_finetuning=config.full_finetuning)
    return found


def files_of(config: TrainConfig) -> tuple[Path, ...]:
    """Returns the files that hold the weights of a run's model.

    Raises:
      FastJaxError: The model cannot be found or read, or is not downloaded yet.
    """
    found = find_files(config)
    base, adapter = read_config(found.folder), found.adapter
    return files_to_load(
        Checkpoint(found.folder),
        base if adapter is None else _config_of_adapter(adapter, base),
        dtype="float32" if config.full_finetuning else config.dtype,
        quant=config.quant,
        folder=_packed_folder(),
    )


def _packed_folder() -> Path:
    return runtime.cache_folder() / "weights"


def load_text_side(
    config: TrainConfig,
) -> tuple["PreTrainedTokenizerBase", TransformerConfig]:
    """Returns the tokenizer and the sizes of a run's model; no weight is read.

    New tokens are in the one, and counted in the other; the context is stretched.

    Raises:
      FastJaxError: The model cannot be found or read, or has no tokenizer, or an
        adapter has no rows for new tokens; says why.
    """
    runtime.configure()
    found = find_files(config)
    tokenizer = load_tokenizer(*found.tokenizer_folders)
    if tokenizer is None:
        raise ModelError(
            "the model folder has no tokenizer",
            where=str(found.folder),
            fix="copy tokenizer.json and tokenizer_config.json of the model there",
        )
    count = tokenizer.add_tokens(list(config.data.new_tokens))
    sizes = read_config(found.folder)
    if found.adapter is not None:
        if count:
            raise ConfigError(
                f"{count} of new_tokens are not in the tokenizer of the adapter, "
                "whose tables have no rows for them",
                where=str(found.adapter),
                fix="merge the adapter with `fastjax export` and train the result, or "
                "leave new_tokens out",
            )
        sizes = grown_config(found.adapter, sizes)
    elif config.data.new_tokens:
        rows = max(sizes.vocab_size, len(tokenizer))
        sizes = dataclasses.replace(sizes, vocab_size=rows)
    return tokenizer, sizes.stretched(config.rope_scaling, config.reach)


def add_adapter(model: LanguageModel, lora: LoRAConfig, *, seed: int) -> None:
    """Gives the model fresh adapters; those it had are dropped.

    With ranks that are still to be measured, nothing else trains until they are.

    Raises:
      ConfigError: Every weight of the model trains, or it lacks the wanted modules.
    """
    if model.spec.trains_weights:
        raise ConfigError(
            "every weight of this model trains (full_finetuning), so an adapter beside "
            "them would do nothing",
            fix="train the model as it is, or load it without full_finetuning",
        )
    held = lora
    if lora.auto_rank:
        held = dataclasses.replace(lora, modules_to_save=(), lora_bias="none")
    adapted = adapters.adapted_spec(adapters.plain_spec(model.spec), held)
    model.decoder = adapters.with_adapters(
        model.decoder,
        model.spec,
        adapted,
        jax.random.key(seed),
        is_gaussian=lora.init_lora_weights == "gaussian",
    )
    model.spec, model.lora = adapted, lora
    if lora.init_lora_weights == "loftq":
        start_from_loss(model, seed=seed)


def _require_no_adapter(found: FoundModel, *, full_finetuning: bool) -> None:
    if full_finetuning and found.adapter is not None:
        raise ConfigError(
            "this is an adapter, and full fine-tuning trains a model without one",
            where=str(found.adapter),
            fix=f"merge it with `fastjax export --model {found.adapter} --output_dir "
            "...` and train the result, or train on without full_finetuning",
        )


def _config_of_adapter(adapter: Path, base: TransformerConfig) -> TransformerConfig:
    """Returns the config of an adapter's training, its tables of the base's size."""
    return dataclasses.replace(grown_config(adapter, base), vocab_size=base.vocab_size)


def _commit(folder: Path) -> str | None:
    """Returns the commit that a folder of the hub's cache holds."""
    return folder.name if folder.parent.name == "snapshots" else None


def _put_adapter(model: LanguageModel, folder: Path) -> None:
    adapter = read_adapter(folder, model.config)
    if adapter.lora.init_lora_weights == "loftq" and not model.spec.has_4bit:
        raise ModelError(
            "this adapter started from what 4 bits lose (LoftQ), so it belongs to the "
            "4-bit weights",
            where=str(folder),
            fix="set load_in_4bit; to merge, --base_precision dequantised",
        )
    if adapter.config.vocab_size > model.config.vocab_size:
        resize_token_embeddings(model, adapter.config.vocab_size)
    plain = dataclasses.replace(adapter.lora, init_lora_weights="default")
    add_adapter(model, plain, seed=0)
    model.lora = adapter.lora
    adapters.set_adapter_weights(model.decoder, model.spec, adapter.weights)
