"""Generation: batches equal single prompts, sampling obeys its limits."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fastjax.api import FastLanguageModel, LanguageModel, load_model
from fastjax.config import QuantConfig
from fastjax.errors import ConfigError
from fastjax.inference import generate as generation
from fastjax.inference.generate import generate
from fastjax.inference.sampling import Sampling, sample
from fastjax.models.build import DecoderSpec, abstract_decoder
from fastjax.models.registry import preset

pytestmark = pytest.mark.usefixtures("optimised")

PROMPTS = ([7, 8, 9], list(range(20, 90)), [300], [44, 45, 46, 47, 48, 49, 50])


@pytest.fixture(scope="module", params=("tiny_llama3", "tiny_mistral", "tiny_qwen3"))
def model(request: pytest.FixtureRequest, fixtures: Path) -> LanguageModel:
    """A tiny 4-bit model."""
    folder = fixtures / request.param
    return load_model(str(folder), dtype="float32", quant=QuantConfig())


def test_a_batch_equals_one_by_one(model: LanguageModel) -> None:
    together = generate(model.decoder, PROMPTS, max_new_tokens=12)
    single = [generate(model.decoder, [p], max_new_tokens=12)[0] for p in PROMPTS]
    assert together == single


def test_the_cache_gives_the_tokens_of_the_whole_forward_pass(
    model: LanguageModel,
) -> None:
    row = list(PROMPTS[3])
    cached = generate(model.decoder, [row], max_new_tokens=6)[0]
    for token in cached:
        scores = model.logits(np.array([row], np.int32))[0, -1]
        assert int(jnp.argmax(scores)) == token
        row.append(token)


def test_decoding_writes_the_cache_in_place() -> None:
    config = dataclasses.replace(preset("tiny").config, num_hidden_layers=8)
    spec = DecoderSpec(config=config, param_dtype="float32", compute_dtype="float32")
    decoder = abstract_decoder(spec)
    graphdef, state = nnx.split(decoder)
    rows = jax.ShapeDtypeStruct((2,), jnp.int32)
    cache = decoder.empty_cache(2, 4096)
    keys = jax.random.split(jax.random.key(0), 2)
    lowered = generation._continue.lower(
        graphdef, Sampling(), state, rows, rows, cache, keys, 8
    )
    memory = lowered.compile().memory_analysis()
    cache_bytes = sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache)
    )
    weight_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert cache_bytes > weight_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 2


def test_a_prefill_gives_the_hidden_states_of_training(model: LanguageModel) -> None:
    """Padding at the end of a row changes neither its tokens nor their cache."""
    ids = jnp.array([[20, 21, 22, 23, 24, 25], [26, 27, 28, 0, 0, 0]], jnp.int32)
    places = jnp.broadcast_to(jnp.arange(6)[None], ids.shape)
    is_token = jnp.array([[True] * 6, [True] * 3 + [False] * 3])
    cache = model.decoder.empty_cache(2, 16)
    hidden, filled = model.decoder.decode(
        ids, positions=jnp.where(is_token, places, 16), cache=cache, is_prefill=True
    )
    expected = model.decoder(ids, positions=places)
    np.testing.assert_array_equal(hidden[is_token], expected[is_token])
    for segment in filled:
        assert np.asarray(segment.keys[:, 0, :6]).any(axis=(-1, -2)).all()
        assert not np.asarray(segment.keys[:, 0, 6:]).any()
        assert not np.asarray(segment.values[:, 1, 3:]).any()


def test_few_shapes_are_compiled() -> None:
    lengths = {generation._rounded(length) for length in range(1, 4097)}
    assert lengths == {64, 128, 256, 512, 1024, 2048, 4096}


@pytest.mark.parametrize("model", ["tiny_llama3"], indirect=True)
def test_sampled_rows_depend_on_their_seed_alone(model: LanguageModel) -> None:
    drawing = Sampling(temperature=1.0, top_k=50, top_p=0.9)
    together = generate(
        model.decoder, PROMPTS, max_new_tokens=8, sampling=drawing, seed=5
    )
    for row, prompt in enumerate(PROMPTS):
        alone = generate(
            model.decoder, [prompt], max_new_tokens=8, sampling=drawing, seed=5 + row
        )
        assert alone[0] == together[row]


@pytest.mark.parametrize("model", ["tiny_llama3"], indirect=True)
def test_stop_tokens_end_a_row_and_streams_bring_the_same(
    model: LanguageModel,
) -> None:
    free = generate(model.decoder, [PROMPTS[0]], max_new_tokens=12)[0]
    stop = free[4]
    cut = free[: free.index(stop) + 1]
    seen: list[int] = []
    stopped = generate(
        model.decoder,
        [PROMPTS[0]],
        max_new_tokens=12,
        stop_ids=[stop],
        on_tokens=lambda new: seen.extend(new[0]),
    )
    assert stopped == [cut]
    assert seen == cut


def test_generate_of_the_handle_takes_padded_batches(fixtures: Path) -> None:
    model = load_model(str(fixtures / "tiny_llama3"), dtype="float32")
    ids = np.zeros((2, 5), np.int32)
    mask = np.zeros((2, 5), np.int32)
    ids[0, 2:], mask[0, 2:] = [7, 8, 9], 1
    ids[1], mask[1] = [5, 6, 7, 8, 9], 1
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4)
    alone = model.generate(input_ids=[[7, 8, 9]], max_new_tokens=4)
    assert out.shape == (2, 9)
    assert out[:, :5].tolist() == ids.tolist()
    assert out[0, 5:].tolist() == alone[0, 3:].tolist()


def test_a_fresh_adapter_costs_nothing_and_switching_off_gives_the_base(
    fixtures: Path,
) -> None:
    base = load_model(str(fixtures / "tiny_llama3"), dtype="float32")
    ids = np.arange(6, 20, dtype=np.int32)[None]
    expected = np.asarray(base.logits(ids))
    model = FastLanguageModel.get_peft_model(base, r=4)
    leaves = jax.tree.leaves(nnx.state(model.for_inference()))
    assert len(leaves) < len(jax.tree.leaves(nnx.state(model.decoder)))
    assert np.array_equal(np.asarray(model.logits(ids)), expected)
    block = model.decoder.segments[0].block
    block.self_attn.q_proj.lora_b.set_value(
        jnp.ones_like(block.self_attn.q_proj.lora_b.get_value())
    )
    assert not np.allclose(np.asarray(model.logits(ids)), expected)
    off = np.asarray(model.logits(ids, uses_adapter=False))
    assert np.array_equal(off, expected)


def test_top_k_and_top_p_keep_the_likeliest() -> None:
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]] * 400, jnp.float32))
    keys = jax.random.split(jax.random.key(0), 400)
    for drawing, allowed in (
        (Sampling(temperature=1.0), {0, 1, 2, 3}),
        (Sampling(temperature=1.0, top_k=2), {0, 1}),
        (Sampling(temperature=1.0, top_p=0.79), {0, 1}),
        (Sampling(temperature=1.0, top_p=0.81), {0, 1, 2}),
        (Sampling(temperature=0.0), {0}),
    ):
        assert set(np.asarray(sample(logits, keys, drawing)).tolist()) == allowed


@pytest.mark.parametrize(
    "fields", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}]
)
def test_impossible_sampling_is_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        Sampling(**fields)


def test_empty_prompts_are_refused(fixtures: Path) -> None:
    model = load_model(str(fixtures / "tiny_llama3"), dtype="float32")
    with pytest.raises(ConfigError, match=r"\[1\] are empty"):
        generate(model.decoder, [[5], []], max_new_tokens=2)
