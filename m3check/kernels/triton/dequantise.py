"""fp8 codes to numbers by integer arithmetic: the same in every dialect, on every target, compiled and interpreted.

Triton converts an fp8 dialect only where the hardware speaks it (no e4m3fn on sm80, no fnuz on NVIDIA). A code's bits moved
into an fp32's place and multiplied by a power of two are exact everywhere, subnormals included.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FORMATS = {
    torch.float8_e4m3fn: "e4m3fn",
    torch.float8_e4m3fnuz: "e4m3fnuz",
    torch.float8_e5m2: "e5m2",
    torch.float8_e5m2fnuz: "e5m2fnuz",
}


def codes(tensor: Tensor) -> tuple[Tensor, str]:
    """A tensor as kernels read it, and its format: fp8 as uint8 codes, all else as it is, called `plain`."""
    form = FORMATS.get(tensor.dtype, "plain")
    return (tensor if form == "plain" else tensor.view(torch.uint8)), form


@triton.jit
def decoded(code, FORM: tl.constexpr):
    """The exact fp32 value of uint8 fp8 codes."""
    bits = code.to(tl.int32)
    magnitude = bits & 0x7F
    sign = (bits & 0x80) << 24
    if FORM == "e4m3fn":  # bias 7, NaN 0x7F and 0xFF, no infinity
        value = (sign | (magnitude << 20)).to(tl.float32, bitcast=True) * 1.329227995784916e36
        value = tl.where(magnitude == 0x7F, float("nan"), value)
    elif FORM == "e4m3fnuz":  # bias 8, NaN 0x80 only
        value = (sign | (magnitude << 20)).to(tl.float32, bitcast=True) * 6.64613997892458e35
        value = tl.where(bits == 0x80, float("nan"), value)
    elif FORM == "e5m2":  # bias 15, infinity 0x7C, NaN above
        value = (sign | (magnitude << 21)).to(tl.float32, bitcast=True) * 5.192296858534828e33
        value = tl.where(bits == 0x7C, float("inf"), tl.where(bits == 0xFC, float("-inf"), value))
        value = tl.where(magnitude > 0x7C, float("nan"), value)
    else:  # e5m2fnuz: bias 16, NaN 0x80 only
        value = (sign | (magnitude << 21)).to(tl.float32, bitcast=True) * 2.596148429267414e33
        value = tl.where(bits == 0x80, float("nan"), value)
    return value


@triton.jit
def operand(raw, FORM: tl.constexpr, DTYPE: tl.constexpr):
    """Loaded values, of whatever format and without a scale, as an operand of tl.dot."""
    if FORM == "plain":
        return raw.to(DTYPE)
    else:
        return decoded(raw, FORM).to(DTYPE)
