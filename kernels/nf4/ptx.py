"""PTX that decodes 4-bit codes, each product of value and scale rounded once.

`decode_word` takes eight codes at a time. The codebook lies in shared memory once for
each of the 32 banks, so that the lanes of a warp read 32 different entries in one
access. A product is formed in float32 (`mul.rn`) and rounded to 16 bits in pairs
(`cvt.rn`): the rounding of `reference.py`. Per code: 3 integer operations for the
address, 1 load, 1 multiplication, 1/2 conversion.

`products` and `look_up` suit a thread that decodes a whole block: its sixteen products
are formed once and split into two tables of sixteen low and sixteen high bytes, four
registers each, in which `prmt` looks up four bytes at a time. Per code of a block of
64: 2.6 integer operations, 1/4 multiplication, 1/8 conversion, no load.
"""

import numpy as np

from .codebooks import CODEBOOKS, Code

CONSTRAINTS = "=r,=r,=r,=r,r,r,f"
"""Out: four pairs of 16-bit values. In: a word of eight codes, where the lane's column
of the table starts, the block's scale."""

FORMATS = {"bfloat16": "bf16x2", "float16": "f16x2"}
"""Formats that the values can be rounded to."""

LANES = 32

_ENTRY_SHIFT = 7  # an entry fills 32 banks of 4 bytes
_MASK = 15 << _ENTRY_SHIFT
# Word bits 4..7 are the first code, 0..3 the second, 12..15 the third, and so on.
_NIBBLES = (1, 0, 3, 2, 5, 4, 7, 6)


def decode_word(dtype: str) -> str:
    """Returns PTX from word `$4`, table `$5` and scale `$6` to pairs `$0` to `$3`."""
    lines = [".reg .b32 t<8>;", ".reg .f32 f<8>;"]
    for i, nibble in enumerate(_NIBBLES):
        shift = _ENTRY_SHIFT - 4 * nibble
        direction = "shl.b32" if shift > 0 else "shr.u32"
        lines += [
            f"{direction} t{i}, $4, {abs(shift)};",
            f"and.b32 t{i}, t{i}, {_MASK:#x};",
            f"add.u32 t{i}, t{i}, $5;",
            f"ld.shared.f32 f{i}, [t{i}];",
            f"mul.rn.f32 f{i}, f{i}, $6;",
        ]
    for i in range(4):
        lines.append(f"cvt.rn.{FORMATS[dtype]}.f32 ${i}, f{2 * i + 1}, f{2 * i};")
    return "{\n" + "\n".join(lines) + "\n}"


PRODUCTS_CONSTRAINTS = "=r,=r,=r,=r,=r,=r,=r,=r,f"
"""Out: four words of low bytes, four of high bytes. In: the block's scale."""

LOOK_UP_CONSTRAINTS = "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r"
"""Out: four pairs of 16-bit values. In: a word of eight codes, then the products."""

_LOW_BYTES, _HIGH_BYTES = 0x6420, 0x7531
# Of four values looked up, the second code's comes first: it has the low nibble.
_FIRST_PAIR, _SECOND_PAIR = 0x4051, 0x6273


def products(code: Code, dtype: str) -> str:
    """Returns PTX from scale `$8` to the tables of bytes `$0` to `$7`."""
    lines = [".reg .f32 f<16>;", ".reg .b32 pair<8>;"]
    for i, bits in enumerate(CODEBOOKS[code].view(np.uint32).tolist()):
        lines.append(f"mul.rn.f32 f{i}, $8, 0f{bits:08X};")
    for i in range(8):
        pair = f"pair{i}, f{2 * i + 1}, f{2 * i}"
        lines.append(f"cvt.rn.{FORMATS[dtype]}.f32 {pair};")
    for i in range(4):
        pairs = f"pair{2 * i}, pair{2 * i + 1}"
        lines.append(f"prmt.b32 ${i}, {pairs}, {_LOW_BYTES:#x};")
        lines.append(f"prmt.b32 ${4 + i}, {pairs}, {_HIGH_BYTES:#x};")
    return "{\n" + "\n".join(lines) + "\n}"


def look_up() -> str:
    """Returns PTX from word `$4` and tables `$5` to `$12` to pairs `$0` to `$3`."""
    lines = [
        ".reg .b32 index, side, below, above, lows, highs;",
        # A selector of prmt has three bits: the fourth chooses the table's half after.
        "and.b32 index, $4, 0x77777777;",
        "shr.u32 side, $4, 1;",
        "and.b32 side, side, 0x44444444;",
        "or.b32 side, side, 0x32103210;",
    ]
    for first in (0, 2):
        for table, found in ((5, "lows"), (9, "highs")):
            lines += [
                f"prmt.b32 below, ${table}, ${table + 1}, index;",
                f"prmt.b32 above, ${table + 2}, ${table + 3}, index;",
                f"prmt.b32 {found}, below, above, side;",
            ]
        lines += [
            f"prmt.b32 ${first}, lows, highs, {_FIRST_PAIR:#x};",
            f"prmt.b32 ${first + 1}, lows, highs, {_SECOND_PAIR:#x};",
            "shr.u32 index, index, 16;",
            "shr.u32 side, side, 16;",
        ]
    return "{\n" + "\n".join(lines) + "\n}"
