"""A small byte-level BPE tokenizer, trained on the embedded text in seconds."""

from collections.abc import Iterable
from pathlib import Path

from fastjax.data.builtin_templates import BUILTIN_TEMPLATES

SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|pad|>",
)


def save_tiny_tokenizer(
    folder: str | Path,
    *,
    texts: Iterable[str],
    vocab_size: int = 4096,
    max_length: int = 2048,
) -> Path:
    """Trains a tokenizer on `texts` and saves it as a Hugging Face folder.

    The same texts give the same files. A text begins with BOS; turns of the chat
    template, and texts, end with `<|eot_id|>`.

    Args:
      folder: Made when it is missing.
      texts: Such as `fastjax.data.embedded_text()`.
      vocab_size: With the special tokens, which come first.
      max_length: Context that the tokenizer's folder declares.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[misc]
    trained.decoder = decoders.ByteLevel()  # type: ignore[misc]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    bos, eos, pad = SPECIAL_TOKENS[0], SPECIAL_TOKENS[4], SPECIAL_TOKENS[5]
    trained.post_processor = TemplateProcessing(  # type: ignore[misc]
        single=f"{bos} $A",
        pair=f"{bos} $A $B",
        special_tokens=[(bos, trained.token_to_id(bos))],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        chat_template=BUILTIN_TEMPLATES["llama-3"].source,
    )
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(path)
    return path
