"""PTX that decodes eight 4-bit codes of one block, each product rounded once.

A codebook has sixteen values and a block one scale, so there are sixteen products. They
are formed in float32 (`mul.rn`), rounded to 16 bits in pairs (`cvt.rn`) and split into
two tables of sixteen low and sixteen high bytes, four registers each. `prmt` then looks
bytes up four at a time. Per code: 1 multiplication, 1/2 conversion, 5 byte and logic
operations, no memory. Exactly the rounding of `reference.py`.
"""

import numpy as np

from .codebooks import CODEBOOKS, Code

CONSTRAINTS = "=&r,=&r,=&r,=&r,r,f"
"""Out: four pairs of 16-bit values. In: a word of eight codes, the block's scale."""

FORMATS = {"bfloat16": "bf16x2", "float16": "f16x2"}
"""Formats that the values can be rounded to."""

_LOW_BYTES, _HIGH_BYTES = 0x6420, 0x7531
# Word bits 4..7 are the first code, 0..3 the second, 12..15 the third, and so on.
_FIRST_PAIR, _SECOND_PAIR = 0x4051, 0x6273


def decode_word(code: Code, dtype: str) -> str:
    """Returns PTX from (word `$4`, scale `$5`) to four packed pairs `$0` to `$3`."""
    lines = [
        ".reg .f32 f<16>;",
        ".reg .b32 pair<8>, low<4>, high<4>;",
        ".reg .b32 index, side, below, above, lows, highs;",
        *_tables(code, FORMATS[dtype]),
        # A selector of prmt has three bits: the fourth chooses the table's half after.
        "and.b32 index, $4, 0x77777777;",
        "shr.u32 side, $4, 1;",
        "and.b32 side, side, 0x44444444;",
        "or.b32 side, side, 0x32103210;",
        *_look_up(0),
        "shr.u32 index, index, 16;",
        "shr.u32 side, side, 16;",
        *_look_up(2),
    ]
    return "{\n" + "\n".join(lines) + "\n}"


def _tables(code: Code, packed: str) -> list[str]:
    """Forms the products and splits them into bytes."""
    lines = [
        f"mul.rn.f32 f{i}, $5, 0f{bits:08X};"
        for i, bits in enumerate(CODEBOOKS[code].view(np.uint32).tolist())
    ]
    for i in range(8):
        lines.append(f"cvt.rn.{packed}.f32 pair{i}, f{2 * i + 1}, f{2 * i};")
    for i in range(4):
        pairs = f"pair{2 * i}, pair{2 * i + 1}"
        lines.append(f"prmt.b32 low{i}, {pairs}, {_LOW_BYTES:#x};")
        lines.append(f"prmt.b32 high{i}, {pairs}, {_HIGH_BYTES:#x};")
    return lines


def _look_up(first: int) -> list[str]:
    """Decodes four codes, the lower half of `index`, into two outputs."""
    lines = []
    for table in ("low", "high"):
        lines += [
            f"prmt.b32 below, {table}0, {table}1, index;",
            f"prmt.b32 above, {table}2, {table}3, index;",
            f"prmt.b32 {table}s, below, above, side;",
        ]
    return [
        *lines,
        f"prmt.b32 ${first}, lows, highs, {_FIRST_PAIR:#x};",
        f"prmt.b32 ${first + 1}, lows, highs, {_SECOND_PAIR:#x};",
    ]
