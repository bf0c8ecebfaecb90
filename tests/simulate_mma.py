"""Matrix instructions as m3check/arch.py describes them, in fp64 on whole tensors: align, cut, add, cut or round."""

from __future__ import annotations

import torch
from torch import Tensor

from m3check.arch import Accumulator


def exponents(x: Tensor) -> Tensor:
    """Exponent e of each number, 2^e ≤ |x| < 2^(e+1); far below everything for 0."""
    return torch.where(x == 0, -1000, torch.frexp(x)[1] - 1)


def added_up(a: Tensor, b: Tensor, how: Accumulator) -> Tensor:
    """a [m, D] times b [n, D] transposed, fp64, summed step by step as `how` says, from 0."""
    assert how.fraction_bits is not None
    if how.operand_bits is not None:
        a, b = cut(a, how.operand_bits - 1), cut(b, how.operand_bits - 1)
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.float64)
    for start in range(0, a.shape[1], how.inner):
        left, right = a[:, None, start : start + how.inner], b[None, :, start : start + how.inner]
        terms = torch.cat([total[..., None], left * right], -1)
        # A product's exponent is the sum of its factors' before its significand is brought below 2.
        places = torch.cat([exponents(total)[..., None], exponents(left) + exponents(right)], -1)
        unit = torch.exp2((places.amax(-1, keepdim=True) - how.fraction_bits).double())
        total = ((terms / unit).trunc() * unit).sum(-1)
        total = total.float().double() if how.nearest else cut(total, how.output_bits)
    return total


def cut(x: Tensor, bits: int) -> Tensor:
    """x toward zero to `bits` fraction bits of its own exponent."""
    unit = torch.exp2((exponents(x) - bits).double())
    return torch.where(x == 0, 0.0, (x / unit).trunc() * unit)
