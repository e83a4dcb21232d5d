"""What `from_pretrained` returns: a decoder, where it came from, its tokenizer."""

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from conversions.peft import Stretch, stretch_of, write_adapter
from fastjax import lora as adapters
from fastjax.api import saving
from fastjax.api.device_faults import device_faults
from fastjax.api.foreign_arguments import GENERATING, SAVING, no_method
from fastjax.api.gguf_folder import write_gguf_folder
from fastjax.api.merging import Merge, added_model
from fastjax.api.rows import (
    feeding,
    open_stream,
    pad_id_of,
    padded_in_front,
    prompt_rows,
    room_of,
    stacked_rows,
    stop_ids_of,
)
from fastjax.config import DType, LoRAConfig
from fastjax.errors import ConfigError, ModelError
from fastjax.files import require_free_name
from fastjax.inference.generate import generate, require_known_tokens
from fastjax.inference.sampling import sampling_of
from fastjax.inference.scores import next_token_scores
from fastjax.models.build import DecoderSpec, num_weights
from fastjax.models.transformer_config import TransformerConfig
from fastjax.nn.decoder import Decoder


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelSource:
    """Where a model came from.

    Attributes:
      name: Hub name or folder, as adapters record it.
      folder: Local folder of config, weights and tokenizer.
      config: What its config.json said when the model was loaded.
      revision: Commit on the hub; None for a folder that is not of its cache.
    """

    name: str
    folder: Path
    config: TransformerConfig
    revision: str | None = None


class LanguageModel:
    """A decoder with its structure, source and tokenizer; the one mutable handle.

    Attributes:
      decoder: Flax module that holds all arrays.
      spec: Structure of the decoder.
      lora: What its adapters are; None without adapters.
      source: Where the base weights came from.
      tokenizer: Of the model's folder; None when it has none.
      max_seq_length: Longest row that training uses, in tokens.
      remat: What training recomputes, as `get_peft_model` was told.
      new_rows: Ids of tokens that the base's folder does not know.
    """

    def __init__(
        self,
        decoder: Decoder,
        spec: DecoderSpec,
        *,
        source: ModelSource,
        tokenizer: Any = None,
        lora: LoRAConfig | None = None,
        max_seq_length: int = 2048,
    ) -> None:
        self.decoder = decoder
        self.spec = spec
        self.source = source
        self.tokenizer = tokenizer
        self.lora = lora
        self.max_seq_length = max_seq_length
        self.remat: str | None = None
        self.new_rows: frozenset[int] = frozenset()

    def __repr__(self) -> str:
        """Returns family, size, storage and adapter in one line."""
        codes = {packed.code for packed in self.spec.packed.values()}
        config, held = self.config, " and ".join(sorted(codes)) or "dense"
        adapter = "" if self.lora is None else f", adapter of rank {self.lora.lora_r}"
        return (
            f"LanguageModel({self.source.name}: {config.family}, "
            f"{config.num_hidden_layers} layers, {held}, "
            f"{self.spec.compute_dtype}{adapter})"
        )

    @property
    def config(self) -> Any:
        """Sizes and switches of the model."""
        return self.spec.config

    @property
    def device(self) -> Any:
        """Where the weights are; what scripts send their inputs to."""
        return next(iter(self.decoder.norm.weight.get_value().devices()))

    @property
    def stretch(self) -> Stretch | None:
        """How the context is longer than the base's files say; None if it is not."""
        return stretch_of(self.config, self.source.config)

    def split(self) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
        """Returns structure, trainable variables and frozen variables."""
        graphdef, trainable, frozen = nnx.split(self.decoder, nnx.Param, ...)
        return graphdef, trainable, frozen

    def update(self, trainable: nnx.State) -> None:
        """Takes over trained variables."""
        nnx.update(self.decoder, trainable)

    def num_parameters(self, *, only_trainable: bool = False) -> int:
        """Returns the number of weights; a 4-bit weight counts as one."""
        _, trainable, frozen = self.split()
        states = [trainable] if only_trainable else [trainable, frozen]
        return num_weights(*states)

    @property
    def trainable_summary(self) -> str:
        """How many weights train, for people, as PEFT says it."""
        count, total = self.num_parameters(only_trainable=True), self.num_parameters()
        return (
            f"trainable params: {count:,} || all params: {total:,} || "
            f"trainable%: {100 * count / total:.4f}"
        )

    def print_trainable_parameters(self) -> None:
        """Prints `trainable_summary`."""
        sys.stdout.write(f"{self.trainable_summary}\n")

    def set_compute_dtype(self, dtype: DType) -> None:
        """Computes in another precision from now on; weights stay as they are."""
        self.spec = dataclasses.replace(self.spec, compute_dtype=dtype)
        self.decoder.compute_dtype = jnp.dtype(dtype)

    def for_inference(self) -> Decoder:
        """Returns the decoder as inference runs it.

        Adapters that change nothing are left out, so that they cost nothing.
        """
        if self.spec.adapters and not adapters.adapters_act(self.decoder, self.spec):
            return adapters.without_adapters(self.decoder, self.spec)
        return self.decoder

    def base_decoder(self) -> Decoder:
        """Returns the decoder with its adapters switched off; it shares all weights."""
        return adapters.without_adapters(self.decoder, self.spec)

    def logits(self, input_ids: np.ndarray, *, uses_adapter: bool = True) -> jax.Array:
        """Returns (B, T, V) float32 scores of the next token at every place.

        Args:
          input_ids: (B, T) token ids, without padding.
          uses_adapter: False runs the base model alone.
        """
        decoder = self.for_inference() if uses_adapter else self.base_decoder()
        require_known_tokens(np.asarray(input_ids).tolist(), decoder)
        return next_token_scores(decoder, jnp.asarray(input_ids, jnp.int32))

    def generate(
        self,
        input_ids: Any,
        *,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        do_sample: bool = False,
        temperature: float | int | None = 1.0,
        top_k: int | None = 0,
        top_p: float | int | None = 1.0,
        min_p: float | int | None = 0.0,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        streamer: Any = None,
        seed: int = 0,
        use_cache: bool = True,
        uses_adapter: bool = True,
        **others: Any,
    ) -> np.ndarray:
        """Returns prompts and their continuations as transformers does.

        Args:
          input_ids: (B, T) token ids, padded on either side, or a list of lists.
          attention_mask: 0 where `input_ids` is padding; None: no padding.
          token_type_ids: What some tokenizers add; these models have no token types.
          max_new_tokens: Most tokens that are added; None goes by max_length, or adds
            128.
          max_length: Most tokens of a prompt as it is given and its answer.
          do_sample: Draw; without, the likeliest token is taken.
          temperature: Divides the scores when drawing.
          top_k: Draw from so many of the likeliest tokens; 0: all.
          top_p: Draw from the likeliest tokens up to this probability.
          min_p: Draw from tokens at least this share as likely as the likeliest.
          eos_token_id: Ends a row; None takes the model's.
          pad_token_id: Fills rows that end early; None takes the tokenizer's.
          streamer: Object with `put(ids)` and `end()`; one prompt only.
          seed: Of the drawing.
          use_cache: Must be true; generation always uses the cache.
          uses_adapter: False generates with the base model alone.
          others: Arguments of transformers that decide nothing here; one that would
            be missed is refused.

        Returns:
          (B, T + longest answer) token ids: the prompts as they were given, then the
          answers. Prompts of different lengths in a list are padded in front.
        """
        del token_type_ids
        GENERATING.require_harmless(others, self.generate)
        if not use_cache:
            raise ConfigError("use_cache=False is not supported: the cache is exact")
        sampling = sampling_of(temperature, top_k, top_p, min_p, do_sample=do_sample)
        given, prompts = prompt_rows(input_ids, attention_mask)
        answers = self._answers(
            prompts,
            streamer,
            uses_adapter=uses_adapter,
            max_new_tokens=room_of(given, max_new_tokens, max_length),
            stop_ids=self.stop_ids(eos_token_id),
            sampling=sampling,
            seed=seed,
        )
        pad_id = pad_id_of(self.tokenizer, self.config, pad_token_id)
        return np.concatenate(
            [padded_in_front(given, pad_id), stacked_rows(answers, pad_id)], 1
        )

    def _answers(
        self,
        prompts: list[list[int]],
        streamer: Any,
        *,
        uses_adapter: bool,
        **options: Any,
    ) -> list[list[int]]:
        decoder = self.for_inference() if uses_adapter else self.base_decoder()
        if streamer is not None:
            open_stream(streamer, prompts)
            options["on_tokens"] = feeding(streamer)
        with device_faults("generate", memory_fix="fewer or shorter prompts at once"):
            answers = generate(decoder, prompts, **options)
        if streamer is not None:
            streamer.end()
        return answers

    def save_pretrained(self, folder: str | Path, **others: Any) -> Path:
        """Writes the adapter as a PEFT folder, or all weights without an adapter.

        Other files of an existing folder stay. `others` are as of `generate`.
        """
        SAVING.require_harmless(others, self.save_pretrained)
        folder = Path(folder)
        if self.lora is not None:
            self.write_adapter(folder, self.split()[1])
        elif not os.path.lexists(folder):
            self.save_pretrained_merged(folder)
        else:
            with added_model(folder) as aside:
                self.save_pretrained_merged(aside, overwrite=True)
        return folder

    def write_adapter(self, folder: Path, trainable: nnx.State) -> None:
        """Writes trainable variables of this model as a PEFT folder."""
        if self.lora is None:
            raise ModelError(
                "this model has no adapter", fix="use get_peft_model first"
            )
        graphdef, _, frozen = self.split()
        decoder = nnx.merge(graphdef, trainable, frozen)
        write_adapter(
            folder,
            adapters.adapter_weights(decoder, self.spec),
            self.lora,
            base_model_name_or_path=self.source.name,
            revision=self.source.revision,
            is_tied=self.config.tie_word_embeddings,
            stretch=self.stretch,
        )

    def save_pretrained_merged(
        self,
        folder: str | Path,
        tokenizer: Any = None,
        *,
        save_method: str = "merged_16bit",
        base_precision: str = "original",
        dtype: str | None = None,
        overwrite: bool = False,
        **others: Any,
    ) -> Path:
        """Writes the model with its adapters merged as a Hugging Face folder.

        Sums are float32, rounded once; config and tokenizer files are copied from the
        base model as they are.

        Args:
          folder: Made; an existing one is replaced only with `overwrite`.
          tokenizer: Saved over the copied files when given.
          save_method: "merged_16bit"; "merged_4bit" writes linears as NF4 of
            bitsandbytes, which rounds what was trained; "lora" only the adapter.
          base_precision: "original" merges onto the weights of the base folder,
            "dequantised" onto the 4-bit ones, which is the function that was trained.
          dtype: Of the weights, as "float16"; None takes that of the activations.
          overwrite: Replace an existing folder.
          others: As of `generate`.
        """
        SAVING.require_harmless(others, self.save_pretrained_merged)
        method = saving.save_method_of(save_method)
        target = Path(folder)
        if method == "lora":
            self.save_pretrained(target)
        else:
            merge = self._merge()
            require_free_name(target, overwrite=overwrite, sources=merge.sources)
            merge.write_folder(
                target,
                base_precision=saving.base_precision_of(base_precision),
                dtype=saving.dtype_of(dtype or self.spec.compute_dtype),
                is_4bit=method == "merged_4bit",
                overwrite=overwrite,
            )
        if tokenizer is None and self.new_rows:
            tokenizer = self.tokenizer
        if tokenizer is not None:
            tokenizer.save_pretrained(target)
        return target

    def save_pretrained_gguf(
        self,
        folder: str | Path,
        tokenizer: Any = None,
        *,
        quantization_method: str | Sequence[str] = "q8_0",
        base_precision: str = "original",
        overwrite: bool = False,
        **others: Any,
    ) -> Path:
        """Writes the model with its adapters merged for llama.cpp and Ollama.

        Args:
          folder: Made: model.gguf and a Modelfile.
          tokenizer: Has no effect: the tokenizer of the base model is written.
          quantization_method: Of the matrices; K-quants need `llama-quantize`.
          base_precision: As in `save_pretrained_merged`.
          overwrite: Replace an existing folder.
          others: As of `generate`.
        """
        del tokenizer
        SAVING.require_harmless(others, self.save_pretrained_gguf)
        precision = saving.base_precision_of(base_precision)
        target, merge = Path(folder), self._merge()
        require_free_name(target, overwrite=overwrite, sources=merge.sources)
        write_gguf_folder(
            target,
            merge,
            merge.weights(precision, self.spec.compute_dtype),
            kind=saving.gguf_kind_of(quantization_method, self.spec.compute_dtype),
            overwrite=overwrite,
        )
        return target

    def _merge(self) -> Merge:
        return Merge(
            name=self.source.name,
            folder=self.source.folder,
            spec=self.spec,
            adapter=adapters.adapter_weights(self.decoder, self.spec),
            decoder=self.decoder,
            needs_4bit=self.lora is not None and self.lora.init_lora_weights == "loftq",
        )

    def stop_ids(
        self, eos_token_id: int | Sequence[int] | None = None
    ) -> tuple[int, ...]:
        """Returns the tokens that end a text: those given, or the model's."""
        return stop_ids_of(self.tokenizer, self.config, eos_token_id)

    def __getattr__(self, name: str) -> Any:
        """Says what to call in place of a method of torch or PEFT."""
        raise AttributeError(no_method("LanguageModel", name))
