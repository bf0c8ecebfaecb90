"""Numbers to fp8 codes by integer arithmetic: the same in every dialect, on every target, compiled and interpreted.

The counterpart of dequantise.py. To nearest, ties to even; past the largest finite code it saturates.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def encoded(value, FORM: tl.constexpr):
    """uint8 codes of fp32 numbers: FORM is one of dequantise.FORMATS, which are told apart by three figures."""
    MANTISSA: tl.constexpr = 3 if FORM == "e4m3fn" or FORM == "e4m3fnuz" else 2
    BIAS: tl.constexpr = 7 if FORM == "e4m3fn" else (8 if FORM == "e4m3fnuz" else (15 if FORM == "e5m2" else 16))
    LARGEST: tl.constexpr = 0x7E if FORM == "e4m3fn" else (0x7B if FORM == "e5m2" else 0x7F)
    FNUZ: tl.constexpr = FORM == "e4m3fnuz" or FORM == "e5m2fnuz"
    SHIFT: tl.constexpr = 23 - MANTISSA
    bits = value.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    nan = magnitude > 0x7F800000
    even = (magnitude >> SHIFT) & 1
    code = ((magnitude + ((1 << (SHIFT - 1)) - 1) + even) >> SHIFT) - ((127 - BIAS) << MANTISSA)
    # Codes below the smallest normal number count equal steps. 2^23 has no room for a fraction, so adding it rounds.
    SMALLEST: tl.constexpr = (128 - BIAS) << 23
    STEPS: tl.constexpr = 2.0 ** (MANTISSA + BIAS - 1)
    size = magnitude.to(tl.float32, bitcast=True)
    steps = tl.where(magnitude < SMALLEST, size * STEPS, 0.0) + 8388608.0
    code = tl.where(magnitude < SMALLEST, steps.to(tl.int32, bitcast=True) & 0xFF, tl.minimum(code, LARGEST))
    if FNUZ:
        sign = tl.where(code == 0, 0, sign)
    code = tl.where(nan, 0x80 if FNUZ else 0x7F | sign, code | sign)
    return code.to(tl.uint8)
