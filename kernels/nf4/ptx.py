"""PTX that decodes 4-bit codes, each product of value and scale rounded once.

`decode_word` takes eight codes at a time. Each half of a warp holds the codebook, a
value a lane, and a shuffle fetches that of a code: it looks at the low four bits of a
register alone. A product is formed in float32 (`mul.rn`) and rounded to 16 bits in
pairs (`cvt.rn`): the rounding of `reference.py`. Per code: 1 shift, 1 shuffle,
1 multiplication, 1/2 conversion.

`look_up` takes two codes at a time, whose pair of 16-bit values, not scaled, lies once
for each bank in a table of 256 entries. Per code: 1/2 permutation of bytes, which forms
the address, and 1/2 load.
"""

from kernels.registers import LANES

CONSTRAINTS = "=r,=r,=r,=r,r,f,f"
"""Out: four pairs of 16-bit values. In: a word of eight codes, the value of the code
that is the lane's number modulo 16, the block's scale."""

FORMATS = {"bfloat16": "bf16x2", "float16": "f16x2"}
"""Formats that the values can be rounded to."""

CODES = 16

_WITHIN_HALF_A_WARP = 0x101F
_ALL_LANES = 0xFFFFFFFF
# Word bits 4..7 are the first code, 0..3 the second, 12..15 the third, and so on.
_NIBBLES = (1, 0, 3, 2, 5, 4, 7, 6)


def decode_word(dtype: str) -> str:
    """Returns PTX from word `$4`, value `$5` and scale `$6` to pairs `$0` to `$3`."""
    lines = [".reg .b32 t<8>;", ".reg .f32 f<8>;"]
    for i, nibble in enumerate(_NIBBLES):
        place = f"{_WITHIN_HALF_A_WARP:#x}, {_ALL_LANES:#x}"
        lines += [
            f"shr.u32 t{i}, $4, {4 * nibble};",
            f"shfl.sync.idx.b32 f{i}, $5, t{i}, {place};",
            f"mul.rn.f32 f{i}, f{i}, $6;",
        ]
    for i in range(4):
        lines.append(f"cvt.rn.{FORMATS[dtype]}.f32 ${i}, f{2 * i + 1}, f{2 * i};")
    return "{\n" + "\n".join(lines) + "\n}"


LOOK_UP_CONSTRAINTS = "=r,r,r,r"
"""Out: a pair of 16-bit values. In: a word of eight codes, four times the lane's place
in its warp, where the table starts."""

ENTRY_WORDS = 2 * LANES
"""Words from one entry of `look_up`'s table to the next, so that an octet of codes is a
byte of the address; the first `LANES` hold the pair, one for each bank."""

# The bank's byte, the octet, and the bytes above the bank's, which are zero.
_ADDRESS_OF_FIRST_OCTET = 0x7604


def look_up(octet: int) -> str:
    """Returns PTX from word `$1`, bank `$2` and table `$3` to the pair `$0`.

    Args:
      octet: Which of the word's four pairs of codes.
    """
    lines = [
        ".reg .b32 place;",
        f"prmt.b32 place, $1, $2, {_ADDRESS_OF_FIRST_OCTET + 16 * octet:#x};",
        "add.u32 place, place, $3;",
        "ld.shared.b32 $0, [place];",
    ]
    return "{\n" + "\n".join(lines) + "\n}"
