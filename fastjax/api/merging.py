"""A base model with an adapter merged onto it, as a stream of weights."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

from jaxtyping import Array

from conversions.hf import (
    WEIGHT_FILES,
    Checkpoint,
    read_config,
    save_model,
    stored_formats,
    stream_weights,
)
from conversions.peft import read_adapter
from fastjax import files
from fastjax.api.finding import ADAPTER_CONFIG, FoundModel, load_tokenizer
from fastjax.config import BasePrecision, DType, QuantConfig
from fastjax.errors import ConfigError, StorageError
from fastjax.lora import adapted_spec
from fastjax.merge import merged_weights
from fastjax.models.build import DecoderSpec, flat_weights, linear_names
from fastjax.nn.decoder import Decoder
from fastjax.nn.linear import PackedFormat
from fastjax.quantize import dense_weights, packed_weights
from fastjax.train.checkpoint import step_of
from fastjax.train.publish import RUN_FILE
from kernels.packed import PackedArray


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Merge:
    """A base model and what is merged onto it; one weight is in memory at a time.

    Attributes:
      name: Of the base model, as adapters record it.
      folder: Of the base model: config, weights, tokenizer.
      spec: Structure of the adapted decoder.
      adapter: Trained arrays by canonical name; none without an adapter.
      needs_4bit: The adapter makes up for what 4 bits lose of the base.
      adapter_folder: Where the adapter lies; None without one, and in memory.
      tokenizer_folder: Has the tokenizer: the adapter's where that has more tokens.
      decoder: Holds the weights when the model is in memory.
      quant: How training held the base, where its record does not say it.
    """

    name: str
    folder: Path
    spec: DecoderSpec
    adapter: Mapping[str, Array]
    decoder: Decoder | None = None
    needs_4bit: bool = False
    adapter_folder: Path | None = None
    tokenizer_folder: Path | None = None
    quant: QuantConfig | None = None

    @classmethod
    def of(cls, found: FoundModel) -> "Merge":
        """Returns the merge of a model or adapter folder; reads only the adapter.

        Raises:
          ModelError: Config or adapter cannot be read.
        """
        spec = DecoderSpec(config=read_config(found.folder))
        adapter: Mapping[str, Array] = {}
        needs_4bit = False
        if found.adapter is not None:
            read = read_adapter(found.adapter, spec.config)
            spec = dataclasses.replace(spec, config=read.config)
            spec, adapter = adapted_spec(spec, read.lora), read.weights
            needs_4bit = read.lora.init_lora_weights == "loftq"
        return cls(
            name=found.name,
            folder=found.folder,
            spec=spec,
            adapter=adapter,
            needs_4bit=needs_4bit,
            adapter_folder=found.adapter,
            tokenizer_folder=_longer_tokenizer(found),
        )

    @property
    def sources(self) -> list[Path]:
        """Folders that are read while the merge is written."""
        folders = (self.folder, self.adapter_folder, self.tokenizer_folder)
        return [folder for folder in folders if folder is not None]

    def quant_of_training(self) -> QuantConfig:
        """Returns how training held the base.

        Without an adapter that is `quant`, or NF4; a base that is stored in 4 bits
        stays as it is.

        Raises:
          ConfigError: Nothing says so, or the base or the run's record says something
            else than `quant`.
        """
        if stored_formats(Checkpoint(self.folder), read_config(self.folder)):
            if self.quant is not None:
                raise ConfigError(
                    "the base is stored in 4 bits, and training held it so",
                    where=str(self.folder),
                    fix="leave load_in_4bit and load_in_8bit out",
                )
            return QuantConfig()
        if self.adapter_folder is None:
            return self.quant or QuantConfig()
        recorded = _recorded_quant(self.adapter_folder) or self.quant
        if self.quant not in (None, recorded):
            raise ConfigError(
                f"training held the base as {recorded}, not as {self.quant}",
                where=str(self.adapter_folder / RUN_FILE),
                fix="leave load_in_4bit and load_in_8bit out",
            )
        if recorded is None:
            raise ConfigError(
                "nothing says in which format training held the base of this adapter: "
                f"{RUN_FILE} of its run is not beside it",
                where=str(self.adapter_folder),
                fix="say it with --load_in_4bit (and --bnb_4bit_quant_type, "
                "--no-bnb_4bit_use_double_quant) or --load_in_8bit, or use "
                "base_precision=original",
            )
        return recorded

    def weights(
        self, base_precision: BasePrecision, dtype: DType
    ) -> Iterator[tuple[str, Array]]:
        """Yields canonical names and dense arrays; what was merged is float32.

        Args:
          base_precision: The weights of the folder, or these quantised from `dtype`
            and dequantised, as training saw them; see `quant_of_training`.
          dtype: Of activations in training.
        """
        return dense_weights(self._merged(base_precision, dtype))

    def write_folder(
        self,
        folder: Path,
        *,
        base_precision: BasePrecision,
        dtype: DType,
        is_4bit: bool,
        overwrite: bool,
        formats: Mapping[str, PackedFormat] | None = None,
    ) -> None:
        """Writes a Hugging Face folder of `dtype`, its linears in 4 bits if wanted.

        A base that is 4-bit already keeps its formats, and every bit of the linears
        that have no adapter. Given `formats` decide instead.
        """
        weights = self._merged(base_precision, dtype)
        packed = {}
        if is_4bit:
            packed = self._formats(dtype) if formats is None else formats
        save_model(
            folder,
            packed_weights(weights, packed) if is_4bit else dense_weights(weights),
            self.spec.config,
            source=self.folder,
            tokenizer_source=self.tokenizer_folder,
            dtype=dtype,
            packed=packed,
            overwrite=overwrite,
        )

    def _merged(
        self, base_precision: BasePrecision, dtype: DType
    ) -> Iterator[tuple[str, Array | PackedArray]]:
        return merged_weights(
            self._base(base_precision, dtype), self.adapter, self.spec
        )

    def _base(
        self, base_precision: BasePrecision, dtype: DType
    ) -> Iterator[tuple[str, Array | PackedArray]]:
        if self.needs_4bit and base_precision == "original":
            raise ConfigError(
                "this adapter started from what 4 bits lose of the base (LoftQ); on "
                "the original weights it would add that twice",
                fix="merge it with base_precision=dequantised",
            )
        is_held = self.spec.trains_weights or base_precision == "dequantised"
        if self.decoder is not None and is_held:
            return flat_weights(self.decoder, self.spec)
        checkpoint, config = Checkpoint(self.folder), read_config(self.folder)
        if base_precision == "dequantised":
            quant = self.quant_of_training()
            return stream_weights(checkpoint, config, dtype=dtype, quant=quant)
        return stream_weights(checkpoint, config, dtype="float32")

    def _formats(self, dtype: DType) -> dict[str, PackedFormat]:
        """Returns the 4-bit format of each linear that is to have one."""
        config = self.spec.config
        stored = {}
        if not self.spec.trains_weights:
            stored = stored_formats(Checkpoint(self.folder), config)
        return stored or dict.fromkeys(linear_names(config), PackedFormat(dtype=dtype))


def added_model(folder: Path) -> contextlib.AbstractContextManager[Path]:
    """Gives an empty folder whose files become the model of an existing `folder`.

    What else lies there stays, but for weights of an older model.

    Raises:
      StorageError: An adapter lies there, which readers would take for the result, or
        the files cannot be written.
    """
    if (folder / ADAPTER_CONFIG).exists():
        raise StorageError(
            "a whole model beside an adapter would be read as the adapter",
            where=str(folder / ADAPTER_CONFIG),
            fix="give another folder, or move the adapter out of this one",
        )
    return files.added_files(folder, replaces=WEIGHT_FILES)


def _recorded_quant(adapter: Path) -> QuantConfig | None:
    """Returns how the run of an adapter held its base; None where nothing says so."""
    folder = adapter.parent if step_of(adapter) >= 0 else adapter
    if not (folder / RUN_FILE).is_file():
        return None
    settings = files.read_json(folder / RUN_FILE).get("settings")
    names = {field.name for field in dataclasses.fields(QuantConfig)}
    if not isinstance(settings, dict) or not names <= settings.keys():
        return None
    return QuantConfig(**{name: settings[name] for name in names})


def _longer_tokenizer(found: FoundModel) -> Path | None:
    """Returns the adapter's folder if its tokenizer has more tokens than the base's."""
    if found.adapter is None:
        return None
    own, base = load_tokenizer(found.adapter), load_tokenizer(found.folder)
    is_longer = own is not None and (base is None or len(own) > len(base))
    return found.adapter if is_longer else None
