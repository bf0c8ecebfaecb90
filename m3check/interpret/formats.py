"""What the bits of bf16 and of the four fp8 dialects mean, in numpy: exact decoding, and rounding to the nearest even.

Overflow follows the instruction that Triton 3.8 emits: e4m3fn and e5m2 saturate, infinities included (PTX
`cvt.rn.satfinite`, seen for sm90); the two fnuz dialects become NaN (`v_cvt_pk_fp8_f32` and `v_cvt_pk_bf8_f32` without
FP16_OVFL, seen for gfx942; torch does the same). NaN stays NaN everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.generic]
Floats: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Fp8:
    """One fp8 dialect; `largest` is its largest finite code, `fnuz` has one zero and one NaN (0x80)."""

    mantissa: int
    bias: int
    largest: int
    fnuz: bool = False


FP8 = {  # Triton's name of the type: its layout (OCP 8-bit floating point specification; fnuz: AMD MI300 ISA)
    "fp8e4nv": Fp8(mantissa=3, bias=7, largest=0x7E),
    "fp8e5": Fp8(mantissa=2, bias=15, largest=0x7B),
    "fp8e4b8": Fp8(mantissa=3, bias=8, largest=0x7F, fnuz=True),
    "fp8e5b16": Fp8(mantissa=2, bias=16, largest=0x7F, fnuz=True),
}
NARROW = frozenset({"bf16", *FP8})  # what numpy cannot calculate with
NUMPY: dict[str, np.dtype[Any]] = {"fp16": np.dtype(np.float16), "fp32": np.dtype(np.float32), "fp64": np.dtype(np.float64)}


def bf16_to_fp32(codes: Array) -> Floats:
    """The exact value of each uint16 code."""
    return np.left_shift(codes, np.uint32(16), dtype=np.uint32, casting="unsafe").view(np.float32)


def fp32_to_bf16(values: Floats, *, truncate: bool = False) -> npt.NDArray[np.uint16]:
    """uint16 codes, rounded to the nearest even (or towards zero)."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    codes: npt.NDArray[np.uint16]
    if truncate:
        codes = (bits >> np.uint32(16)).astype(np.uint16)
    else:
        rounded = bits >> np.uint32(16)
        rounded &= np.uint32(1)
        rounded += np.uint32(0x7FFF)
        rounded += bits
        rounded >>= np.uint32(16)
        codes = rounded.astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():
        codes = np.where(nan, (bits >> np.uint32(16)).astype(np.uint16) | np.uint16(0x40), codes)
    return codes.reshape(np.shape(values))


@cache
def fp8_values(name: str) -> Floats:
    """The value of each of the 256 codes."""
    form = FP8[name]
    codes = np.arange(256)
    fraction = codes & ((1 << form.mantissa) - 1)
    exponent = (codes & 0x7F) >> form.mantissa
    normal = np.ldexp(1 + fraction / (1 << form.mantissa), exponent - form.bias)
    subnormal = np.ldexp(fraction / (1 << form.mantissa), 1 - form.bias)
    values = np.where(exponent == 0, subnormal, normal)
    if form.fnuz:
        values = np.where(codes >= 0x80, -values, values)
        values[0x80] = np.nan
    else:
        special = np.inf if name == "fp8e5" else np.nan
        values = np.where(codes & 0x7F == form.largest + 1, special, values)
        values = np.where(codes & 0x7F > form.largest + 1, np.nan, values)
        values = np.where(codes >= 0x80, -values, values)
    return values.astype(np.float32)


@cache
def fp8_table(name: str, target: str) -> Array:
    """fp8 code -> the code of the same value in `target` (bf16, fp16, fp32, fp64: all of them hold every fp8 value)."""
    values = fp8_values(name)
    return fp32_to_bf16(values) if target == "bf16" else values.astype(NUMPY[target])


def fp32_to_fp8(values: Floats, name: str, *, truncate: bool = False) -> npt.NDArray[np.uint8]:
    """uint8 codes, rounded to the nearest even (or towards zero); overflow as in this module's first paragraph."""
    form = FP8[name]
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).reshape(np.shape(values))
    magnitude = (bits & np.uint32(0x7FFFFFFF)).astype(np.int64)
    size = magnitude.astype(np.uint32).view(np.float32)
    shift = 23 - form.mantissa
    half = 0 if truncate else (1 << (shift - 1)) - 1 + ((magnitude >> shift) & 1)
    normal = ((magnitude + half) >> shift) - ((127 - form.bias) << form.mantissa)
    # Below the smallest normal number codes count equal steps, which float64 divides exactly.
    with np.errstate(invalid="ignore", over="ignore"):
        steps = np.ldexp(size.astype(np.float64), form.mantissa + form.bias - 1)
        steps = np.where(steps < 1 << form.mantissa, steps, 0)
    subnormal = (np.floor(steps) if truncate else np.rint(steps)).astype(np.int64)
    code = np.where(size < np.ldexp(1.0, 1 - form.bias), subnormal, normal)
    infinite_or_nan = magnitude >= 0x7F800000
    overflow = ((code > form.largest) | infinite_or_nan) if not truncate else infinite_or_nan
    code = np.where(overflow, 0x80 if form.fnuz else form.largest, np.minimum(code, form.largest))
    negative = (bits >> np.uint32(31)).astype(np.int64) << 7
    if form.fnuz:
        negative = np.where(code == 0, 0, negative)
    code = code | negative
    code = np.where(np.isnan(size), 0x80 if form.fnuz else 0x7F, code)
    return np.asarray(code, dtype=np.uint8)


@cache
def halves_to_fp8(source: str, name: str, truncate: bool) -> npt.NDArray[np.uint8]:
    """The fp8 code of each of the 65,536 bf16 or fp16 codes."""
    codes = np.arange(1 << 16, dtype=np.uint16)
    values = bf16_to_fp32(codes) if source == "bf16" else codes.view(np.float16).astype(np.float32)
    return fp32_to_fp8(values, name, truncate=truncate)


def decode(data: Array, name: str) -> Floats:
    """float32 of bf16 or fp8 codes, exactly."""
    if name == "bf16":
        return bf16_to_fp32(data)
    table: Floats = fp8_values(name)
    return table.take(data.view(np.uint8))


def encode(values: Array, name: str, *, truncate: bool = False) -> Array:
    """bf16 or fp8 codes of float values."""
    single = values.astype(np.float32, copy=False)
    return fp32_to_bf16(single, truncate=truncate) if name == "bf16" else fp32_to_fp8(single, name, truncate=truncate)


def convert(data: Array, source: str, target: str, *, truncate: bool = False) -> Array:
    """Codes (narrow types) or numbers (others) of type `source` as type `target`; both names are Triton's."""
    if source in FP8:
        if target in NUMPY or target == "bf16":
            return fp8_table(source, target).take(data.view(np.uint8))
        return encode(decode(data, source), target, truncate=truncate)
    if target in FP8 and source in ("bf16", "fp16"):
        return halves_to_fp8(source, target, truncate).take(np.ascontiguousarray(data).view(np.uint16))
    wide = bf16_to_fp32(data) if source == "bf16" else data
    if target in NARROW:
        return encode(wide, target, truncate=truncate)
    if truncate:
        return _towards_zero(wide, NUMPY[target])
    with np.errstate(over="ignore"):
        return wide.astype(NUMPY[target])


def _towards_zero(values: Array, target: np.dtype[Any]) -> Array:
    with np.errstate(over="ignore"):
        nearest = values.astype(target)
    wide = nearest.astype(values.dtype)
    too_large = np.abs(wide) > np.abs(values)
    return np.asarray(np.where(too_large, np.nextafter(nearest, target.type(0)), nearest))
