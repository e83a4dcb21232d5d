"""The handle: generation by transformers' rules, and what it writes."""

import copy
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from transformers import TextStreamer

from fastjax.api import FastLanguageModel, load_model
from fastjax.api.generation import answer
from fastjax.errors import ConfigError, DataError, ModelError, StorageError
from fastjax.inference.sampling import Sampling

pytestmark = pytest.mark.usefixtures("compiled_once")

IDS = np.arange(20, 32, dtype=np.int32)[None]


class Collected(list):
    """A streamer that keeps what it is given."""

    def put(self, ids: np.ndarray) -> None:
        self.extend(ids.tolist())

    def end(self) -> None:
        self.append("end")


@pytest.fixture(scope="module")
def loaded(small_model: Path) -> tuple[Any, Any]:
    """The plain model and its tokenizer."""
    return FastLanguageModel.from_pretrained(
        str(small_model), 64, "float32", load_in_4bit=False
    )


def test_scripts_written_for_torch_run(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    inputs = tokenizer(["one two three"], return_tensors="pt").to("cuda")
    assert inputs["input_ids"].shape == inputs.input_ids.shape
    outputs = model.generate(**inputs, max_new_tokens=5, use_cache=True)
    prompt = inputs.input_ids.to("cuda")
    assert outputs[:, : prompt.shape[1]].tolist() == prompt.tolist()
    assert outputs.shape[1] <= prompt.shape[1] + 5
    assert isinstance(tokenizer.batch_decode(outputs)[0], str)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}],
        tokenize=True,
        add_generation_prompt=True,
        return_tensors="pt",
    ).to(model.device)
    sampled = model.generate(
        input_ids=chat, max_new_tokens=3, do_sample=True, temperature=1.5, min_p=0.1
    )
    assert sampled.shape[1] <= chat.shape[1] + 3
    both = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], return_tensors="pt", return_dict=True
    )
    assert set(both.keys()) >= {"input_ids", "attention_mask"}


def test_streamers_get_the_prompt_and_each_token(
    loaded: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = loaded
    inputs = tokenizer(["one two"], return_tensors="pt")
    streamer = Collected()
    out = model.generate(**inputs, streamer=streamer, max_new_tokens=4)
    assert streamer == [*out[0].tolist(), "end"]
    model.generate(**inputs, streamer=TextStreamer(tokenizer), max_new_tokens=4)
    shown = capsys.readouterr().out
    assert shown.strip() == tokenizer.decode(out[0]).strip()
    with pytest.raises(ConfigError, match="a streamer takes one prompt, not 2"):
        model.generate([[7], [8]], streamer=streamer)


def test_lists_of_different_lengths_are_padded_in_front(
    loaded: tuple[Any, Any],
) -> None:
    model, _ = loaded
    alone = model.generate([[7, 8, 9]], max_new_tokens=4, eos_token_id=[])
    both = model.generate(
        [[7, 8, 9], [5]], max_new_tokens=4, eos_token_id=[], pad_token_id=1
    )
    assert both[0].tolist() == alone[0].tolist()
    assert both[1, :3].tolist() == [1, 1, 5]


@pytest.mark.parametrize(
    ("ids", "options", "error", "message"),
    [
        ([[7]], {"use_cache": False}, ConfigError, "use_cache"),
        ([7, 8], {}, ConfigError, "rows of token ids"),
        ([[]], {}, ConfigError, "empty"),
        ([[512]], {}, DataError, "token 512 is outside the embedding"),
        ([[-1]], {}, DataError, "token -1 is outside"),
        ([[7]], {"max_new_tokens": 0}, ConfigError, "max_new_tokens=0"),
        ([[7]], {"do_sample": True, "top_p": 0}, ConfigError, "top_p"),
        ([[7]], {"do_sample": True, "min_p": 2}, ConfigError, "min_p"),
        ([[7]], {"attention_mask": [[1, 1]]}, ConfigError, "different shapes"),
        ([[7, 8]], {"max_length": 2}, ConfigError, "a prompt of 2 tokens"),
        ([[7]], {"num_beams": 4}, ConfigError, "num_beams=4 .* do_sample=True"),
        ([[7]], {"repetition_penalty": 1.1}, ConfigError, "repetition_penalty=1.1"),
        ([[7]], {"stop_strings": ["x"]}, ConfigError, "eos_token_id"),
        ([[7]], {"suppress_tokens": np.arange(2)}, ConfigError, "may be drawn"),
        ([[7]], {"max_token": 3}, ConfigError, "did you mean 'max_new_tokens'"),
    ],
)
def test_what_cannot_be_generated(
    loaded: tuple[Any, Any],
    ids: list,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        loaded[0].generate(ids, **options)


def test_arguments_of_transformers_that_ask_for_nothing(
    loaded: tuple[Any, Any],
) -> None:
    model, _ = loaded
    expected = model.generate(IDS, max_new_tokens=3, eos_token_id=[])
    drawing = {"temperature": None, "top_p": None, "top_k": None, "min_p": None}
    harmless = {"num_beams": 1, "repetition_penalty": 1.0, "early_stopping": True}
    actual = model.generate(
        IDS, max_length=IDS.shape[1] + 3, eos_token_id=[], **drawing, **harmless
    )
    assert actual.tolist() == expected.tolist()
    both = model.generate(IDS, max_length=64, max_new_tokens=3, eos_token_id=[])
    assert both.tolist() == expected.tolist()


def test_methods_of_other_tools_name_what_to_call(loaded: tuple[Any, Any]) -> None:
    model, _ = loaded
    with pytest.raises(AttributeError, match="save_pretrained_merged"):
        model.merge_and_unload()
    with pytest.raises(AttributeError, match=r"has no 'nothing'$"):
        _ = model.nothing
    assert copy.copy(model).spec == model.spec


def test_scripts_may_set_what_decides_nothing(loaded: tuple[Any, Any]) -> None:
    model, _ = loaded
    before = copy.deepcopy(model.config)
    model.config.use_cache = False
    model.config.pretraining_tp = 1
    model.config.pad_token_id = 7
    assert model.config == before
    for name in ("pretraining_tp", "num_hidden_layers", "nosuch"):
        with pytest.raises(ConfigError, match=f"{name} of a model's config cannot be"):
            setattr(model.config, name, 2)
    assert model.config == before


def test_settings_of_drawing_without_drawing_are_warned_of(
    loaded: tuple[Any, Any],
) -> None:
    with pytest.warns(UserWarning, match="do_sample=True"):
        loaded[0].generate([[7]], max_new_tokens=1, temperature=0.7)


def test_min_p_keeps_the_likely(loaded: tuple[Any, Any]) -> None:
    model, _ = loaded
    greedy = model.generate(IDS, max_new_tokens=4)
    nearly = model.generate(IDS, max_new_tokens=4, do_sample=True, min_p=1.0)
    assert greedy.tolist() == nearly.tolist()


def test_answers_in_text_and_in_pieces(loaded: tuple[Any, Any]) -> None:
    model, _ = loaded
    texts = answer(model, ["one", "two three"], max_new_tokens=4)
    assert len(texts) == 2
    pieces: list[str] = []
    streamed = answer(model, ["one"], max_new_tokens=4, stream=pieces.append)
    assert "".join(pieces) == streamed[0] == texts[0]
    hot = Sampling(temperature=1.0)
    drawn = [
        answer(model, ["one"], max_new_tokens=4, sampling=hot, seed=s) for s in (3, 3)
    ]
    assert drawn[0] == drawn[1]


def test_a_model_without_a_tokenizer_says_so(fixtures: Path) -> None:
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(fixtures / "tiny_llama3"), dtype="float32"
    )
    assert tokenizer is None
    with pytest.raises(ModelError, match="no tokenizer"):
        answer(model, ["one"])


def test_tokens_outside_the_embedding_have_no_logits(loaded: tuple[Any, Any]) -> None:
    with pytest.raises(DataError, match="token 512"):
        loaded[0].logits(np.array([[512]], np.int32))


@pytest.mark.parametrize("in_4bit", [False, True])
def test_merging_gives_the_function_that_was_trained(
    small_model: Path, tmp_path: Path, in_4bit: bool
) -> None:
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(small_model), 64, "float32", in_4bit
    )
    FastLanguageModel.get_peft_model(model, r=4)
    for name in ("q_proj", "o_proj"):
        linear = getattr(model.decoder.segments[0].block.self_attn, name)
        held = linear.lora_b.get_value()
        linear.lora_b.set_value(jnp.full_like(held, 0.02))
    folder = model.save_pretrained_merged(
        tmp_path / "merged",
        tokenizer,
        save_method="merged_16bit",
        base_precision="dequantised" if in_4bit else "original",
    )
    merged = load_model(str(folder), dtype="float32")
    assert merged.lora is None
    np.testing.assert_allclose(merged.logits(IDS), model.logits(IDS), atol=2e-4)
    assert merged.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    with pytest.raises(StorageError, match="exists already"):
        model.save_pretrained_merged(folder)
    adapter = model.save_pretrained_merged(
        tmp_path / "a", tokenizer, save_method="lora"
    )
    assert (adapter / "adapter_model.safetensors").is_file()
    assert (adapter / "tokenizer.json").is_file()


def test_a_fresh_model_saves_itself_whole(
    loaded: tuple[Any, Any], tmp_path: Path
) -> None:
    model, _ = loaded
    model.save_pretrained(tmp_path / "whole")
    again = load_model(str(tmp_path / "whole"), dtype="float32")
    np.testing.assert_array_equal(again.logits(IDS), model.logits(IDS))


@pytest.mark.parametrize(
    "save", ["save_pretrained", "save_pretrained_merged", "save_pretrained_gguf"]
)
def test_arguments_of_saving_that_ask_for_nothing(
    loaded: tuple[Any, Any], tmp_path: Path, save: str
) -> None:
    write = getattr(loaded[0], save)
    with pytest.raises(ConfigError) as caught:
        write(tmp_path / "a", safe_serialization=False, push_to_hub=True, token="hf_s")
    assert "safetensors alone" in str(caught.value)
    assert "fastjax push" in str(caught.value)
    assert "hf_s" not in str(caught.value)
    with pytest.raises(ConfigError, match="has no argument 'save_metod'"):
        write(tmp_path / "a", save_metod="lora")
    assert not (tmp_path / "a").exists()
    write(tmp_path / "a", safe_serialization=True, max_shard_size="5GB", token=None)
    assert (tmp_path / "a").is_dir()


def test_a_gguf_folder_holds_one_kind(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names 2 kinds, and a folder holds one"):
        loaded[0].save_pretrained_gguf(
            tmp_path / "a", quantization_method=["q8_0", "f16"]
        )
