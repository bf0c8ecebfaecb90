"""How far correct arithmetic may be off: formats, roundings, and sums of products. docs/bounds.md derives every line."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from m3check.arch import Accumulator

LN2 = math.log(2.0)
LOG2E = 1.0 / LN2

U32 = 2.0**-24
"""Half an ulp of 1 in fp32."""

EXP2_ERROR = 2.0**-22
"""Relative error of exp2 and log2 approximations: 2 ulp, as NVIDIA states for ex2.approx and lg2.approx."""


@dataclass(frozen=True)
class Format:
    """A floating-point format: significand bits with the hidden one, and the exponent of the smallest normal number."""

    significand: int
    smallest: int
    largest: float

    @property
    def u(self) -> float:
        """Half an ulp of 1."""
        return 2.0**-self.significand


FORMATS = {
    torch.float64: Format(53, -1022, torch.finfo(torch.float64).max),
    torch.float32: Format(24, -126, torch.finfo(torch.float32).max),
    torch.float16: Format(11, -14, torch.finfo(torch.float16).max),
    torch.bfloat16: Format(8, -126, torch.finfo(torch.bfloat16).max),
    torch.float8_e4m3fn: Format(4, -6, 448.0),
    torch.float8_e4m3fnuz: Format(4, -7, 240.0),
    torch.float8_e5m2: Format(3, -14, 57344.0),
    torch.float8_e5m2fnuz: Format(3, -15, 57344.0),
}


def half_ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the distance between neighbours of `dtype` around each |x| (fp64), half the smallest subnormal at least."""
    form = FORMATS[dtype]
    _, exponent = torch.frexp(x.double())  # |x| = m · 2^exponent with m in [1/2, 1)
    exponent = exponent.where(x != 0, form.smallest + 1).clamp(min=form.smallest + 1)  # frexp gives 0 for 0
    return torch.exp2((exponent - 1 - form.significand).double())


@dataclass(frozen=True)
class DotError:
    """What may be wrong with sums of products [..., m, n], in fp32: a part of one sign, and a part that is random."""

    value: Tensor
    """The sums themselves."""
    bias: Tensor | None
    """Worst case of what truncation and operand conversion do; None where there is none."""
    deviation: Tensor
    """Standard deviation (proxy) of the roundings to nearest."""
    worst: Tensor
    """What the roundings to nearest can do at most."""

    def limit(self, deviations: float) -> Tensor:
        """The largest error that is explained."""
        random = torch.minimum(self.worst, deviations * self.deviation)
        return random if self.bias is None else self.bias + random


def dot_error(a: Tensor, b: Tensor, how: Accumulator, whole: bool = False) -> DotError:
    """Errors of a [..., m, D] times b [..., n, D] transposed, summed as `how` says; a and b in fp32.

    `whole` says that all operands are integers: sums that fit the accumulator are exact then.
    """
    terms = a.shape[-1]
    a_abs, b_abs = a.abs(), b.abs()
    value = a @ b.mT
    size = a_abs @ b_abs.mT
    # No partial sum, in whatever order, exceeds the sum of the positive or that of the negative products.
    partial = (size + value.abs()) * (0.5 * (1 + 2.0**-10))
    bias: Tensor | None = None
    if how.fraction_bits is None:
        worst = (terms + 3) * U32 * partial
        deviation = math.sqrt((terms + 3) / 3) * U32 * partial
    else:
        bias = _truncation(a, b, how)
        worst = torch.zeros_like(value)
        deviation = worst
    if how.operand_bits is not None:
        converted = 2.0 ** (2 - how.operand_bits) * size  # both operands, cut rather than rounded
        bias = converted if bias is None else bias + converted
    return _exact(value, size, bias, deviation, worst, how) if whole else DotError(value, bias, deviation, worst)


def _truncation(a: Tensor, b: Tensor, how: Accumulator) -> Tensor:
    """Worst case of matrix instructions that align `inner` products and the accumulator to the largest and cut the rest."""
    assert how.fraction_bits is not None
    unit = (how.inner + 1) * 2.0 ** (1 - how.fraction_bits)
    total = a.new_zeros(*a.shape[:-1], b.shape[-2])
    error = torch.zeros_like(total)
    for start in range(0, a.shape[-1], how.inner):
        part_a, part_b = a[..., start : start + how.inner], b[..., start : start + how.inner]
        largest = (part_a.square() @ part_b.square().mT).sqrt()  # at least the largest |product| of the step
        error += unit * torch.maximum(total.abs(), largest)
        total += part_a @ part_b.mT
        error += 2.0**-23 * total.abs()
    return error * (1 + 2.0**-8)


def whole(a: Tensor, b: Tensor) -> bool:
    """Whether all elements of both are integers."""
    return bool((a.float().frac() == 0).all() & (b.float().frac() == 0).all())


def _exact(
    value: Tensor, size: Tensor, bias: Tensor | None, deviation: Tensor, worst: Tensor, how: Accumulator
) -> DotError:
    fits = size < 2.0 ** (23 if how.fraction_bits is None else min(how.fraction_bits - 1, 23))
    if how.operand_bits is not None:  # operands of more bits than the instruction takes are cut
        fits = torch.zeros_like(fits)
    zero = torch.zeros_like(value)
    if bias is not None:
        bias = torch.where(fits, zero, bias)
    return DotError(value, bias, torch.where(fits, zero, deviation), torch.where(fits, zero, worst))
