"""The kernel's PTX, run instruction by instruction in NumPy."""

import re

import ml_dtypes
import numpy as np
import pytest

from kernels.nf4 import CODEBOOKS
from kernels.nf4.ptx import CODES, ENTRY_WORDS, decode_word, look_up
from kernels.registers import LANES

WORDS = 512
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def prmt(a, b, selector):
    """Returns the four bytes of b:a that the nibbles of `selector` choose."""
    source = np.concatenate([a[:, None].view(np.uint8), b[:, None].view(np.uint8)], 1)
    chosen = np.zeros_like(a)
    for byte in range(4):
        nibble = (selector >> np.uint32(4 * byte)) & 15
        assert (nibble < 8).all()  # the upper values would replicate a sign
        picked = np.take_along_axis(source, nibble[:, None].astype(np.int64), 1)[:, 0]
        chosen |= picked.astype(np.uint32) << np.uint32(8 * byte)
    return chosen


def fetched(value, source, place, members):
    """Returns the value of lane `source` modulo 16 in the own half of the warp."""
    assert (place == 0x101F).all()
    assert (members == 2**32 - 1).all()
    lane = np.arange(WORDS)
    return value[lane // 16 * 16 + source % 16]


def execute(assembly, registers, memory, dtype):
    """Runs the instructions that the decoder uses; `registers` is changed."""

    def value(operand):
        if operand in registers:
            return registers[operand]
        return np.full(WORDS, int(operand, 0), np.uint32)

    def packed(high, low):
        halves = [
            x.astype(dtype).view(np.uint16).astype(np.uint32) for x in (high, low)
        ]
        return halves[0] << np.uint32(16) | halves[1]

    operations = {
        "mul.rn.f32": lambda a, b: a * b,
        "cvt.rn.bf16x2.f32": packed,
        "cvt.rn.f16x2.f32": packed,
        "ld.shared.b32": lambda address: memory[address // 4],
        "prmt.b32": prmt,
        "shfl.sync.idx.b32": fetched,
        "and.b32": np.bitwise_and,
        "add.u32": np.add,
        "shl.b32": np.left_shift,
        "shr.u32": np.right_shift,
    }
    for line in assembly.strip("{}\n").splitlines():
        if line.startswith(".reg"):
            continue
        operation, result, *operands = re.split(r"[ ,;\[\]]+", line.rstrip(";]"))
        registers[result] = operations[operation](*map(value, operands))
    return registers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("code", ["nf4", "fp4"])
def test_every_code_is_scaled_and_rounded_once(code, dtype):
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**32, WORDS, dtype=np.uint32)
    scales = rng.lognormal(sigma=2, size=WORDS).astype(np.float32)
    values = np.tile(CODEBOOKS[code], WORDS // CODES)
    registers = {"$4": words, "$5": values, "$6": scales}
    execute(decode_word(dtype), registers, None, DTYPES[dtype])
    _assert_decoded(registers, words, scales, code, dtype)


@pytest.mark.parametrize("octet", range(4))
def test_a_pair_of_codes_is_one_look_up_in_the_lanes_own_bank(octet):
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**32, WORDS, dtype=np.uint32)
    lanes = rng.integers(0, LANES, WORDS, dtype=np.uint32)
    base = 1024
    table = np.arange(base // 4 + 256 * ENTRY_WORDS, dtype=np.uint32)
    registers = {"$1": words, "$2": 4 * lanes, "$3": np.full(WORDS, base, np.uint32)}
    found = execute(look_up(octet), registers, table, None)["$0"] - base // 4
    assert (found % ENTRY_WORDS == lanes).all()
    assert (found // ENTRY_WORDS == words[:, None].view(np.uint8)[:, octet]).all()


def _assert_decoded(registers, words, scales, code, dtype):
    pairs = np.stack([registers[f"${i}"] for i in range(4)], axis=1)
    octets = words[:, None].view(np.uint8)
    nibbles = np.stack([octets >> 4, octets & 15], axis=-1).reshape(WORDS, 8)
    expected = (CODEBOOKS[code][nibbles] * scales[:, None]).astype(DTYPES[dtype])
    np.testing.assert_array_equal(pairs.view(np.uint16), expected.view(np.uint16))
