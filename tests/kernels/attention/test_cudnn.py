"""cuDNN attention: what it refuses, what it lowers to, and its numbers on a GPU."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import SAVED_PRIMITIVES, attention, cudnn
from kernels.attention.cases import GPU_CASES
from kernels.device import HOPPER, assume_compute_capability, compute_capability
from kernels.dispatch import UnsupportedOp, record
from kernels.numerics import relative_error, tolerance

BY_NAME = {case.name: case for case in GPU_CASES}
FORWARD, BACKWARD = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"


def named(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


@pytest.fixture
def hopper(monkeypatch):
    """Lets programs for compute capability 9.0 be traced on any machine."""
    fused = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(cudnn, "compute_capability", lambda: (9, 0))
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91900)
    monkeypatch.setattr(fused, "check_compute_capability", lambda target: True)
    monkeypatch.setattr(fused, "is_cuda_compute_capability_equal", lambda target: False)


def shapes(case, dtype=jnp.bfloat16):
    q = (case.batch, case.tokens, case.heads, case.head_size)
    k = (case.batch, case.tokens, case.kv_heads, case.head_size)
    return tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in (q, k, k))


def objective(case, implementation="cudnn"):
    def call(q, k, v):
        out = attention(q, k, v, implementation=implementation, **case.options())
        return out.astype(jnp.float32).sum()

    return call


@named(GPU_CASES)
def test_lowers_for_cuda(hopper, case):
    step = jax.jit(jax.grad(objective(case), argnums=(0, 1, 2)))
    lowered = step.trace(*shapes(case)).lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count(f'"{FORWARD}"') + lowered.count(f"@{FORWARD}(") == 1
    assert lowered.count(f'"{BACKWARD}"') + lowered.count(f"@{BACKWARD}(") == 1


@named([case for case in GPU_CASES if len(case.documents) < 2])
def test_its_backward_follows_the_forward_kernel(hopper, case):
    step = jax.jit(jax.grad(objective(case, "mosaic_gpu_cudnn"), argnums=(0, 1, 2)))
    with assume_compute_capability(HOPPER):
        traced = step.trace(*shapes(case))
        lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "attention_forward" in lowered
    assert "attention_dq" not in lowered
    assert lowered.count(f'"{BACKWARD}"') + lowered.count(f"@{BACKWARD}(") == 1


def test_packed_rows_pass_their_segments(hopper):
    case = BY_NAME["llama3_8b_packed"]
    trace = jax.jit(objective(case)).trace(*shapes(case))
    lowered = trace.lower(lowering_platforms=("cuda",)).as_text()
    assert "PADDING_CAUSAL" in lowered
    assert r"max_seg_per_batch\22: 5" in lowered


def test_one_document_a_row_needs_no_segments(hopper):
    case = BY_NAME["llama3_8b_padded"]
    trace = jax.jit(objective(case)).trace(*shapes(case))
    lowered = trace.lower(lowering_platforms=("cuda",)).as_text()
    assert "PADDING_CAUSAL" not in lowered
    assert "CAUSAL" in lowered


@pytest.mark.parametrize("case_name", ["llama3_8b", "llama3_8b_packed"])
@pytest.mark.parametrize("keeps", [True, False])
def test_saved_primitives_spare_the_forward_pass(hopper, case_name, keeps):
    case = BY_NAME[case_name]

    def policy(primitive, *_, **__):
        return keeps and primitive.name in SAVED_PRIMITIVES

    def block(q, k, v):
        return objective(case)(jnp.sin(q), k, v)

    remat = jax.checkpoint(block, policy=policy)
    jaxpr = str(jax.make_jaxpr(jax.grad(remat))(*shapes(case)))
    assert jaxpr.count("dot_product_attention_fwd_wrapper[") == (1 if keeps else 2)


def test_segment_bounds():
    ids = jnp.array([[1, 1, 2, 2, 2, 3], [1, 0, 0, 0, 0, 0], [0] * 6], jnp.int32)
    lengths, starts = cudnn.segment_bounds(ids, 4)
    assert np.array_equal(lengths, [[2, 3, 1, -1], [1, -1, -1, -1], [-1] * 4])
    assert np.array_equal(starts, [[0, 2, 5, -1, -1], [0, -1, -1, -1, -1], [-1] * 5])


def undefined_outside_segments(q, k, v, **options):
    """Stands for cuDNN: NaN where it writes nothing, forward and backward."""
    lengths = options["q_seqlen"]
    used = jnp.maximum(lengths, 0).sum(axis=1)
    undefined = jnp.arange(q.shape[1])[None] >= used[:, None]
    undefined = undefined[:, :, None, None]

    @jax.custom_vjp
    def kernel(q, k, v):
        return jnp.where(undefined, jnp.nan, q)

    def forward(q, k, v):
        return kernel(q, k, v), (k, v)

    def backward(kv, dout):
        return tuple(jnp.where(undefined, jnp.nan, x) for x in (dout, *kv))

    kernel.defvjp(forward, backward)
    return kernel(q, k, v)


def test_what_cudnn_leaves_in_padding_is_replaced(hopper, monkeypatch):
    fused = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "dot_product_attention", undefined_outside_segments)
    q = jnp.ones((2, 6, 2, 8), jnp.bfloat16)
    ids = jnp.array([[1, 1, 2, 2, 0, 0], [1, 2, 2, 0, 0, 0]], jnp.int32)

    def call(q, k, v):
        return attention(
            q, k, v, segment_ids=ids, max_segments=2, implementation="cudnn"
        )

    out, pullback = jax.vjp(call, q, q, q)
    for x in (out, *pullback(jnp.ones_like(out))):
        assert np.isfinite(np.asarray(x, np.float32)).all()
        assert not np.asarray(x)[np.asarray(ids) == 0].any()
        assert np.asarray(x)[np.asarray(ids) != 0].all()


def test_more_documents_than_promised_give_nan(hopper, monkeypatch):
    fused = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "dot_product_attention", lambda q, k, v, **_: q)
    q = jnp.ones((1, 4, 2, 8), jnp.bfloat16)
    ids = jnp.array([[1, 2, 3, 0]], jnp.int32)
    out = attention(q, q, q, segment_ids=ids, max_segments=2, implementation="cudnn")
    assert np.isnan(np.asarray(out, np.float32)).any(axis=(2, 3)).tolist() == [
        [False, False, True, False]
    ]


def test_a_cpu_is_refused():
    if compute_capability() is not None:
        pytest.skip("there is a CUDA GPU")
    q = jnp.ones((1, 4, 2, 8), jnp.bfloat16)
    with pytest.raises(UnsupportedOp, match="needs a CUDA device"):
        attention(q, q, q, implementation="cudnn")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softcap": 2.0}, "softcap"),
        ({"window": jnp.int32(2)}, "plain integer"),
        ({"q_index": jnp.zeros((1, 4), jnp.int32)}, "whole row"),
        ({"segment_ids": jnp.ones((1, 4), jnp.int32)}, "max_segments"),
        (
            {
                "segment_ids": jnp.ones((1, 4), jnp.int32),
                "q_segment_ids": jnp.ones((1, 4), jnp.int32),
            },
            "same array",
        ),
        (
            {
                "segment_ids": jnp.ones((1, 4), jnp.int32),
                "max_segments": 2,
                "window": 2,
            },
            "sliding window",
        ),
    ],
)
def test_what_it_lacks_is_refused(hopper, options, message):
    q = jnp.ones((1, 4, 2, 8), jnp.bfloat16)
    with pytest.raises(UnsupportedOp, match=message):
        attention(q, q, q, implementation="cudnn", **options)


def test_float32_is_refused(hopper):
    q = jnp.ones((1, 4, 2, 8), jnp.float32)
    with pytest.raises(UnsupportedOp, match="bfloat16 or float16"):
        attention(q, q, q, implementation="cudnn")


def test_odd_lengths_are_refused(hopper):
    q = jnp.ones((1, 5, 2, 8), jnp.bfloat16)
    with pytest.raises(UnsupportedOp, match="even lengths"):
        attention(q, q, q, implementation="cudnn")


@pytest.mark.parametrize(
    ("capability", "head_size", "packed", "accepted"),
    [
        (None, 64, False, False),
        ((7, 5), 64, False, False),
        ((8, 0), 128, False, True),
        ((8, 0), 64, True, False),
        ((8, 9), 256, False, False),
        ((9, 0), 256, True, True),
        ((9, 0), 264, False, False),
        ((9, 0), 20, False, False),
    ],
)
def test_devices(monkeypatch, capability, head_size, packed, accepted):
    monkeypatch.setattr(cudnn, "compute_capability", lambda: capability)
    if accepted:
        cudnn.check_device(head_size, packed=packed)
        return
    with pytest.raises(UnsupportedOp):
        cudnn.check_device(head_size, packed=packed)


@pytest.mark.parametrize(
    ("implementation", "max_segments"), [("cudnn", 2), ("mosaic_gpu_cudnn", 1)]
)
def test_a_jax_without_the_private_api_is_refused(
    hopper, monkeypatch, implementation, max_segments
):
    monkeypatch.setattr(cudnn, "_PRIVATE_API", "jax._src.cudnn.moved_elsewhere")
    q = jnp.ones((1, 4, 2, 8), jnp.bfloat16)
    options = {"segment_ids": jnp.ones((1, 4), jnp.int32), "max_segments": max_segments}
    with pytest.raises(UnsupportedOp, match="moved_elsewhere"):
        attention(q, q, q, implementation=implementation, **options)


@pytest.mark.parametrize(
    "name",
    [
        "_dot_product_attention_bwd_p_wrapper",
        "MaskType",
        "AttentionLayout",
        "check_cudnn_version",
    ],
)
def test_a_gradient_that_jax_renamed_is_refused_in_the_forward_pass(
    hopper, monkeypatch, name
):
    fused = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.delattr(fused, name)
    q = jnp.ones((1, 128, 2, 64), jnp.bfloat16)
    with (
        assume_compute_capability(HOPPER),
        pytest.raises(UnsupportedOp, match=name),
    ):
        attention(q, q, q, implementation="mosaic_gpu_cudnn")


@pytest.mark.parametrize("max_segments", [1, 2])
def test_without_cudnn_the_default_moves_on(hopper, monkeypatch, max_segments):
    fused = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")

    def missing():
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(fused, "check_cudnn_version", missing)
    q = jnp.ones((1, 4, 2, 8), jnp.bfloat16)
    ids = jnp.ones((1, 4), jnp.int32)
    options = {"segment_ids": ids, "max_segments": max_segments}
    with pytest.raises(UnsupportedOp, match="cuDNN is not detected"):
        attention(q, q, q, implementation="cudnn", **options)
    with record() as chosen:
        attention(q, q, q, **options)
    assert chosen == {"attention": {"xla"}}


def test_other_runtime_errors_are_shown(hopper, monkeypatch):
    fused = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")

    def broken():
        raise RuntimeError("cuDNN is too old")

    monkeypatch.setattr(fused, "check_cudnn_version", broken)
    q = jnp.ones((1, 4, 2, 8), jnp.bfloat16)
    with pytest.raises(RuntimeError, match="too old"):
        attention(q, q, q)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("implementation", "case"),
    [("cudnn", case) for case in GPU_CASES]
    + [("mosaic_gpu_cudnn", case) for case in GPU_CASES if len(case.documents) < 2],
    ids=lambda value: getattr(value, "name", value),
)
def test_matches_the_float32_reference(implementation, case):
    arrays, options = case.arrays(jnp.bfloat16), case.options()

    def output_and_gradients(arrays, implementation):
        def op(q, k, v):
            return attention(q, k, v, implementation=implementation, **options)

        @jax.jit
        def run(*arrays):
            out, pullback = jax.vjp(op, *arrays)
            return out, *pullback(jnp.cos(arrays[0]))

        return run(*arrays)

    actual = output_and_gradients(arrays, implementation)
    floats = tuple(x.astype(jnp.float32) for x in arrays)
    expected = output_and_gradients(floats, "xla")
    for got, want in zip(actual, expected, strict=True):
        assert np.isfinite(np.asarray(got, np.float32)).all()
        assert relative_error(got, want) < tolerance(jnp.bfloat16, terms=3)


@pytest.mark.gpu
def test_other_documents_cannot_change_a_bit():
    case = BY_NAME["llama3_8b_packed"]
    arrays, options = case.arrays(jnp.bfloat16), case.options()
    first = np.asarray(options["segment_ids"]) == 1
    changed = tuple(
        jnp.where(first[:, :, None, None], y, x)
        for x, y in zip(arrays, case.arrays(jnp.bfloat16, seed=1), strict=True)
    )
    op = jax.jit(lambda *arrays: attention(*arrays, implementation="cudnn", **options))
    before, after = np.asarray(op(*arrays)), np.asarray(op(*changed))
    assert np.array_equal(before[~first], after[~first])
