"""`FastLanguageModel`: loading and adapting models by the calls that users know."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from fastjax import nvidia, runtime
from fastjax.api.foreign_arguments import ADAPTING, LOADING
from fastjax.api.language_model import LanguageModel
from fastjax.api.loading import add_adapter, load_model
from fastjax.api.tokenizer import Tokenizer
from fastjax.api.vocabulary import require_trained_rows
from fastjax.config import ALL_LINEAR, DType, LoRABias, RematChoice
from fastjax.errors import ConfigError
from fastjax.flat_config import train_config
from kernels.device import compute_capability

_AMPERE = (8, 0)


class FastLanguageModel:
    """Static methods that return or change a `LanguageModel`."""

    @staticmethod
    def from_pretrained(
        model_name: str,
        max_seq_length: int = 2048,
        dtype: Any = None,
        load_in_4bit: bool = True,
        *,
        load_in_8bit: bool = False,
        load_in_16bit: bool = False,
        full_finetuning: bool = False,
        revision: str = "main",
        bnb_4bit_quant_type: str = "nf4",
        use_gradient_checkpointing: bool | str | None = None,
        memory_gib: float | int = 0,
        rope_scaling: str | None = None,
        token: str | None = None,
        trust_remote_code: bool = False,
        device_map: Any = None,
        **others: Any,
    ) -> tuple[LanguageModel, Tokenizer | None]:
        """Returns the model of a preset, folder or hub name, and its tokenizer.

        Args:
          model_name: Preset name, folder or hub name; an adapter folder gives its
            base model with the adapter.
          max_seq_length: Longest row that training uses, in tokens.
          dtype: Of activations: a name or a NumPy dtype; None takes bfloat16 where
            the device has it, else float16.
          load_in_4bit: Hold frozen weights in 4 bits.
          load_in_8bit: Hold them in 8 bits instead, with a scale for each output.
          load_in_16bit: Hold them in 16 bits, as load_in_4bit=False does.
          full_finetuning: Train every weight; turns 4 and 8 bits off.
          revision: Branch, tag or commit of a hub model.
          bnb_4bit_quant_type: "nf4" or "fp4".
          use_gradient_checkpointing: As in `get_peft_model`, for full fine-tuning.
          memory_gib: GPU memory that the process takes at most; 0 leaves it to JAX. The
            first use of the device decides, so it is given here, not in training.
          rope_scaling: "linear", "dynamic" or "yarn" stretches RoPE where
            max_seq_length is beyond the model's context; None refuses longer rows.
          token: Must be None: tokens do not belong into scripts.
          trust_remote_code: Must be false: no code of a model repository is run.
          device_map: Has no effect: arrays live on JAX's default device.
          others: Arguments of Unsloth that decide nothing here; one that would be
            missed is refused.

        Raises:
          FastJaxError: The model cannot be found, read or held; says why.
        """
        del device_map
        LOADING.require_harmless(others, FastLanguageModel.from_pretrained)
        _require_none(token)
        if load_in_8bit and load_in_16bit:
            raise ConfigError("load_in_8bit and load_in_16bit contradict each other")
        settings = {
            "bnb_4bit_quant_type": bnb_4bit_quant_type,
            "load_in_4bit": load_in_4bit
            and not (full_finetuning or load_in_8bit or load_in_16bit),
            "load_in_8bit": load_in_8bit and not full_finetuning,
            "rope_scaling": rope_scaling or "none",
            "trust_remote_code": trust_remote_code,
        }
        flat = train_config(settings).config
        runtime.configure(memory_share=nvidia.memory_share(memory_gib))
        model = load_model(
            model_name,
            revision=revision,
            dtype=_dtype_name(dtype),
            quant=flat.quant,
            full_finetuning=full_finetuning,
            max_seq_length=max_seq_length,
            rope_scaling=flat.rope_scaling,
        )
        if use_gradient_checkpointing is not None:
            model.remat = _remat(use_gradient_checkpointing)
        tokenizer = model.tokenizer
        return model, None if tokenizer is None else Tokenizer(tokenizer)

    @staticmethod
    def get_peft_model(
        model: LanguageModel,
        r: int = 16,
        target_modules: str | Sequence[str] = ALL_LINEAR,
        lora_alpha: float | int = 16,
        *,
        lora_dropout: float | int = 0,
        bias: LoRABias = "none",
        lora_bias: bool = False,
        use_rslora: bool = False,
        use_dora: bool = False,
        use_gradient_checkpointing: bool | str = True,
        random_state: int = 3407,
        max_seq_length: int | None = None,
        modules_to_save: Sequence[str] | None = None,
        layers_to_transform: int | Sequence[int] | None = None,
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, float | int] | None = None,
        trainable_token_indices: Sequence[int] | None = None,
        auto_rank: bool = False,
        init_lora_weights: bool | str = True,
        loftq_config: dict[str, Any] | None = None,
        **others: Any,
    ) -> LanguageModel:
        """Returns the model with fresh adapters on the targeted linear layers.

        Args:
          model: Changed in place.
          r: Rank.
          target_modules: "all-linear", a regular expression, or names by suffix.
          lora_alpha: The adapter is multiplied by alpha / r.
          lora_dropout: Share of the adapter's input dropped while training.
          bias: Biases that train.
          lora_bias: The up projections of adapters have biases that train.
          use_rslora: Multiply by alpha / sqrt(r) instead.
          use_dora: Train a magnitude for each output feature.
          use_gradient_checkpointing: True recomputes attention blocks in the backward
            pass, "unsloth" whole layers, False only norms and activations.
          random_state: Seed of the adapters' start.
          max_seq_length: Replaces the model's.
          modules_to_save: "embed_tokens" and "lm_head" train whole when named.
          layers_to_transform: Only these layers get adapters.
          rank_pattern: Other ranks by the end of module names, or expressions for it.
          alpha_pattern: Other alphas, likewise.
          trainable_token_indices: Tokens whose embeddings train.
          auto_rank: The trainer's first batches move rank to the modules that need it;
            their parameters stay those of `r` everywhere.
          init_lora_weights: True or "gaussian" start from the base model, "loftq" from
            what its 4 bits lose.
          loftq_config: Has no effect: LoftQ is for 4 bits and one iteration.
          others: As of `from_pretrained`.

        Raises:
          ConfigError: A value is out of range, or the targets match nothing.
        """
        del loftq_config
        ADAPTING.require_harmless(others, FastLanguageModel.get_peft_model)
        settings = {
            "lora_r": r,
            "lora_alpha": lora_alpha,
            "lora_dropout": lora_dropout,
            "lora_target_modules": target_modules,
            "lora_bias": bias,
            "lora_b_bias": lora_bias,
            "use_rslora": use_rslora,
            "use_dora": use_dora,
            "modules_to_save": modules_to_save,
            "layers_to_transform": layers_to_transform,
            "rank_pattern": rank_pattern,
            "alpha_pattern": alpha_pattern,
            "trainable_token_indices": trainable_token_indices,
            "auto_rank": auto_rank,
            "init_lora_weights": init_lora_weights,
        }
        lora = train_config(settings).config.lora
        model.remat = _remat(use_gradient_checkpointing)
        require_trained_rows(model, lora)
        add_adapter(model, lora, seed=random_state)
        if max_seq_length is not None:
            model.max_seq_length = max_seq_length
        return model

    @staticmethod
    def for_inference(model: LanguageModel) -> LanguageModel:
        """Returns the model as it is: generation needs no preparation."""
        return model

    @staticmethod
    def for_training(model: LanguageModel) -> LanguageModel:
        """Returns the model as it is: training needs no preparation."""
        return model


def _require_none(token: str | None) -> None:
    if token is not None:
        raise ConfigError(
            "token is not taken, so that it does not stay in scripts and logs",
            fix="run `hf auth login` once, or set HF_TOKEN in the environment",
        )


def is_bfloat16_supported() -> bool:
    """Whether the device multiplies bfloat16: CUDA GPUs from Ampere on, and CPUs."""
    runtime.configure()
    capability = compute_capability()
    return capability is None or capability >= _AMPERE


def _remat(use_gradient_checkpointing: bool | str) -> RematChoice:
    return train_config({"remat": use_gradient_checkpointing}).config.remat


def _dtype_name(dtype: Any) -> DType:
    if dtype is None:
        return "bfloat16" if is_bfloat16_supported() else "float16"
    is_name = isinstance(dtype, str) or str(dtype).startswith("torch.")
    name = str(dtype) if is_name else jnp.dtype(dtype).name
    return train_config({"dtype": name}).config.dtype
