"""Arguments and methods of Unsloth, transformers and PEFT that calls here lack.

One that decides nothing here is taken and has no effect, one that would be ignored to
somebody's loss is refused with what to do instead.
"""

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from fastjax.errors import ConfigError, printable

_OFF = (None, False, 0)
_ON = (None, True)
_ONE = (None, 1)
_EMPTY = (None, [], ())


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ForeignArguments:
    """What a call makes of arguments that it does not have.

    Attributes:
      without_effect: Names that decide nothing here.
      only: Name -> values that ask for nothing, and what to do for the others.
    """

    without_effect: frozenset[str]
    only: Mapping[str, tuple[tuple[Any, ...], str]]

    def require_harmless(
        self, given: Mapping[str, Any], call: Callable[..., Any]
    ) -> None:
        """Raises one `ConfigError` for all arguments that `call` would leave undone."""
        problems = []
        for name, value in given.items():
            if name in self.without_effect:
                continue
            harmless, advice = self.only.get(name, ((), ""))
            # An array asks for something, and has no truth when compared.
            is_array = hasattr(value, "__array__")
            if not is_array and any(value == known for known in harmless):
                continue
            if advice:
                shown = printable(value, 40)
                problems.append(f"{name}={shown} is not supported: {advice}")
            else:
                own = [
                    each.name
                    for each in inspect.signature(call).parameters.values()
                    if each.kind is not inspect.Parameter.VAR_KEYWORD
                ]
                near = difflib.get_close_matches(name, own, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                problems.append(f"{call.__name__} has no argument {name!r}{hint}")
        if problems:
            raise ConfigError.of(problems)


LOADING = ForeignArguments(
    without_effect=frozenset(
        [
            "attn_implementation",
            "disable_log_stats",
            "fix_tokenizer",
            "float32_mixed_precision",
            "gpu_memory_utilization",
            "low_cpu_mem_usage",
            "max_lora_rank",
            "random_state",
            "unsloth_tiled_mlp",
            "use_cache",
            "use_exact_model_name",
            "use_safetensors",
        ]
    ),
    only={
        "cache_dir": ((None,), "set HF_HOME in the environment"),
        "fast_inference": (_OFF, "vLLM is not used; leave it out, and call generate"),
        "float8_kv_cache": (_OFF, "the cache of generate has the model's dtype"),
        "load_in_fp8": (_OFF, "load_in_8bit=True holds weights in 8 bits"),
        "local_files_only": (_OFF, "set HF_HUB_OFFLINE=1 in the environment"),
        "offload_embedding": (_OFF, "embeddings stay on the device"),
        "qat_scheme": (_OFF, "weights in 4 or 8 bits are trained as they are"),
        "quantization_config": (
            (None,),
            "give load_in_4bit, load_in_8bit and bnb_4bit_quant_type",
        ),
        "resize_model_vocab": (_OFF, "call add_new_tokens(model, tokenizer, [...])"),
        "torch_dtype": ((None,), "its name here is dtype"),
    },
)

_TARGETS = "target_modules names the linear layers that get adapters"
ADAPTING = ForeignArguments(
    without_effect=frozenset(["inference_mode", "task_type", "temporary_location"]),
    only={
        "finetune_attention_modules": (_ON, _TARGETS),
        "finetune_language_layers": (_ON, _TARGETS),
        "finetune_mlp_modules": (_ON, _TARGETS),
        "finetune_vision_layers": (_OFF, "models here have no vision layers"),
        "layer_replication": (_OFF, "layers are as many as the model has"),
        "layers_pattern": (_EMPTY, "layers_to_transform counts the decoder's layers"),
        "qat_scheme": (_OFF, "weights in 4 or 8 bits are trained as they are"),
        "target_parameters": (_EMPTY, _TARGETS),
    },
)

_NO_CODE = "no code runs between tokens; a streamer gets each token as it comes"
_SCORES = "model.logits(ids) gives the scores of all tokens"
GENERATING = ForeignArguments(
    without_effect=frozenset(
        [
            "bos_token_id",
            "cache_implementation",
            "early_stopping",
            "length_penalty",
            "remove_invalid_values",
            "renormalize_logits",
            "synced_gpus",
            "tokenizer",
        ]
    ),
    only={
        "bad_words_ids": (_EMPTY, "every token may be drawn"),
        "generation_config": ((None,), "give its values as arguments"),
        "logits_processor": (_EMPTY, _NO_CODE),
        "min_length": (_OFF, "eos_token_id=[] gives answers of max_new_tokens"),
        "min_new_tokens": (_OFF, "eos_token_id=[] gives answers of max_new_tokens"),
        "no_repeat_ngram_size": (
            _OFF,
            "do_sample=True with a temperature repeats less",
        ),
        "num_beams": (_ONE, "tokens are the likeliest, or drawn with do_sample=True"),
        "num_return_sequences": (
            _ONE,
            "give the prompt so many times, with do_sample=True",
        ),
        "output_attentions": (_OFF, "no attention scores are ever held"),
        "output_hidden_states": (_OFF, _SCORES),
        "output_logits": (_OFF, _SCORES),
        "output_scores": (_OFF, _SCORES),
        "penalty_alpha": (_OFF, "do_sample=True with top_k, top_p or min_p draws"),
        "prefix_allowed_tokens_fn": ((None,), _NO_CODE),
        "repetition_penalty": (_ONE, "do_sample=True with a temperature repeats less"),
        "return_dict_in_generate": (_OFF, "generate returns the token ids"),
        "stop_strings": (
            _EMPTY,
            "eos_token_id names the tokens that end a text; cut the text at others",
        ),
        "stopping_criteria": (_EMPTY, _NO_CODE),
        "suppress_tokens": (_EMPTY, "every token may be drawn"),
        "typical_p": (_ONE, "do_sample=True with top_p or min_p draws"),
    },
)

_PUSHED = "save into a folder, then run: fastjax push FOLDER --hub_model_id NAME"
SAVING = ForeignArguments(
    without_effect=frozenset(
        [
            "create_pr",
            "first_conversion",
            "max_shard_size",
            "maximum_memory_usage",
            "private",
            "save_embedding_layers",
            "save_peft_format",
            "temporary_location",
            "token",
        ]
    ),
    only={
        "is_main_process": (_ON, "one process writes"),
        "push_to_hub": (_OFF, _PUSHED),
        "safe_serialization": (_ON, "weights are written as safetensors alone"),
        "save_function": ((None,), "weights are written as safetensors alone"),
        "selected_adapters": (
            (None, ["default"], ("default",)),
            "a model has one adapter",
        ),
        "state_dict": ((None,), "the model's own weights are written"),
        "variant": ((None,), "files have their usual names"),
    },
)

_MERGED = (
    "model.save_pretrained_merged(folder) writes the merged model, and "
    "FastLanguageModel.from_pretrained(folder) loads it"
)
_LOADED = "FastLanguageModel.from_pretrained(adapter_folder) loads model and adapter"
_PLACED = "leave it out: arrays are on JAX's device already"
_SWITCHED = "leave it out: training and generation need no switch"
_REMAT = "give use_gradient_checkpointing to get_peft_model"
# Methods of models of torch, transformers, PEFT, Unsloth -> what there is here.
_MODEL_METHODS = {
    **dict.fromkeys(("merge_and_unload", "merge_adapter"), _MERGED),
    **dict.fromkeys(("load_adapter", "load_lora"), _LOADED),
    **dict.fromkeys(("push_to_hub", "push_to_hub_merged", "push_to_hub_gguf"), _PUSHED),
    **dict.fromkeys(("to", "cuda", "cpu", "half", "bfloat16"), _PLACED),
    **dict.fromkeys(("eval", "train"), _SWITCHED),
    **dict.fromkeys(
        ("enable_input_require_grads", "gradient_checkpointing_enable"), _REMAT
    ),
    "disable_adapter": "generate and logits take uses_adapter=False",
    "fast_generate": "generate takes rows of token ids",
    "forward": "logits(ids) gives the scores of all tokens",
    "get_nb_trainable_parameters": "num_parameters(only_trainable=True) counts them",
    "resize_token_embeddings": "fastjax.api.resize_token_embeddings(model, size) does",
    "save_lora": "save_pretrained(folder) writes the adapter",
}
_LOGGED = "train and evaluate return the numbers, metrics.jsonl of the run holds them"
_COMPILED = "the step is compiled as a whole, as TrainingArguments say"
# The same of transformers' trainer.
_TRAINER_METHODS = {
    **dict.fromkeys(("add_callback", "pop_callback", "remove_callback"), _LOGGED),
    **dict.fromkeys(("log", "log_metrics", "save_metrics"), _LOGGED),
    **dict.fromkeys(
        ("accelerator", "create_optimizer_and_scheduler", "lr_scheduler", "optimizer"),
        _COMPILED,
    ),
    **dict.fromkeys(
        ("get_eval_dataloader", "get_train_dataloader"),
        "train_dataset and eval_dataset show the rows as they are trained",
    ),
    "hyperparameter_search": "fastjax.api.run_sweep trains several adapters",
    "push_to_hub": _PUSHED,
    "save_state": "leave it out: each checkpoint of the run holds its state",
    "tokenizer": "its name here is processing_class",
}
_METHODS = {"LanguageModel": _MODEL_METHODS, "SFTTrainer": _TRAINER_METHODS}


def no_method(owner: str, name: str) -> str:
    """Returns what to say of a method that a class of ours lacks."""
    advice = _METHODS[owner].get(name)
    return f"{owner} has no {name!r}" + (f": {advice}" if advice else "")
