"""Adapter folders of one base combined into one."""

from collections.abc import Sequence
from pathlib import Path

from conversions.hf import COMPANION_FILES, read_config
from conversions.peft import Stretch, read_adapter, stretch_of, write_adapter
from fastjax import runtime
from fastjax.api.finding import find_model
from fastjax.combine import Part, combined
from fastjax.config import CombineMethod
from fastjax.errors import ConfigError, ModelError
from fastjax.files import new_folder, require_free_name


def combine_adapters(
    folders: Sequence[str | Path],
    output: Path,
    *,
    weights: Sequence[float] | None = None,
    method: CombineMethod = "concat",
    rank: int | None = None,
    overwrite: bool = False,
) -> str:
    """Writes the combination of adapters as a PEFT folder; returns a line on it.

    Args:
      folders: Of adapters of one base.
      output: Folder of the result.
      weights: Factor of each; None takes 1.
      method: See `fastjax.combine.combined`.
      rank: Of the result, for the method "svd".
      overwrite: Replaces what has the name of the result.

    Raises:
      ConfigError: The numbers disagree, or the adapters cannot be combined.
      StorageError: The name is taken, or the folder cannot be written.
      ModelError: An adapter cannot be read, or belongs to another base.
    """
    runtime.configure()
    factors = [1.0] * len(folders) if weights is None else list(map(float, weights))
    if len(folders) < 2 or len(factors) != len(folders):
        raise ConfigError(
            f"{len(folders)} adapters and {len(factors)} weights: there must be two "
            "adapters or more, and a weight for each"
        )
    if rank is not None and (rank < 1 or method != "svd"):
        raise ConfigError(
            f"rank={rank} with method={method}: a rank is for method=svd, at least 1"
        )
    require_free_name(output, overwrite=overwrite, sources=map(Path, folders))
    parts, (base, revision), stretch, tokenizers = _read(folders, factors)
    require_free_name(output, overwrite=overwrite, sources=[Path(base)])
    agree = all(files == tokenizers[0] for files in tokenizers)
    lora, arrays = combined(parts, method=method, rank=rank)
    with new_folder(output, overwrite=overwrite) as new:
        write_adapter(
            new,
            arrays,
            lora,
            base_model_name_or_path=base,
            revision=revision,
            stretch=stretch,
        )
        for name, content in tokenizers[0].items() if agree else ():
            (new / name).parent.mkdir(exist_ok=True)
            (new / name).write_bytes(content)
    line = f"{len(parts)} adapters by {method}, of rank {lora.lora_r}: {output}"
    if agree:
        return line
    return f"{line}; without tokenizer and chat template, in which the adapters differ"


def _read(
    folders: Sequence[str | Path], factors: Sequence[float]
) -> tuple[list[Part], tuple[str, str | None], Stretch | None, list[dict[str, bytes]]]:
    """Returns adapters, name and revision of their base, its stretch, tokenizers."""
    parts: list[Part] = []
    bases: dict[tuple[str, str | None], None] = {}
    contexts: list[Stretch | None] = []
    tokenizers: list[dict[str, bytes]] = []
    for folder, factor in zip(folders, factors, strict=True):
        found = find_model(str(folder), with_weights=False)
        if found.adapter is None:
            raise ModelError("this folder holds no adapter", where=str(folder))
        sizes = read_config(found.folder)
        adapter = read_adapter(found.adapter, sizes)
        contexts.append(stretch_of(adapter.config, sizes))
        parts.append(Part(lora=adapter.lora, weights=adapter.weights, factor=factor))
        bases[found.name, adapter.revision] = None
        tokenizers.append(_tokenizer_files(found.adapter))
    if len(bases) > 1:
        names = [f"{name} at {revision}" for name, revision in bases]
        raise ModelError(
            f"the adapters belong to different base models: {', '.join(names)}",
            fix="combine adapters of one base",
        )
    if any(context != contexts[0] for context in contexts):
        raise ModelError(
            "the adapters trained with different contexts of their base",
            fix="combine adapters of one max_length and rope_scaling",
        )
    (base,) = bases
    return parts, base, contexts[0], tokenizers


def _tokenizer_files(folder: Path) -> dict[str, bytes]:
    """Returns the content of the files of tokenizer and chat template by name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for pattern in COMPANION_FILES
        for path in sorted(folder.glob(pattern))
    }
