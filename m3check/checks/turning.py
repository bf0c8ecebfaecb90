"""How far a norm and a rotation of correct arithmetic may be off, and what may be stored then (docs/bounds.md, Inserts)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from m3check.checks.bounds import FORMATS, U32, half_ulp

Emission = Literal["direct", "rounded"]

RSQRT = 2.0**-21
"""Relative error of 1/sqrt in fp32: rsqrt.approx (2^-22.9), or a square root and a division, each approximate."""

FLUSHED = 2.0**-125
"""Two products that were flushed to zero."""

DIVISION = 4
"""Errors of a division of each channel by the root (2 ulp), in u, where a product with the reciprocal has one."""

SCALING = 2.0**-22
"""Relative error of a division by a scale in fp32: 2 ulp, or a rounded reciprocal and a product."""


@dataclass(frozen=True)
class Turned:
    """Heads [T, heads, D] after norm and rotation (fp64), and how far fp32 arithmetic may be off before it rounds."""

    value: Tensor
    bound: Tensor


def kept(more: Mapping[str, Tensor], name: str) -> Tensor:
    """[T] bool: the tokens whose numbers an output has; of a cache those with a slot in it."""
    found = more["kept_idx" if name == "cached_idx_k" else "kept"]
    return found if name.startswith("cached_") else torch.ones_like(found)


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Heads after their norm, in fp64."""
    x = x.double()
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (1 + weight.double())


def turned(x: Tensor, weight: Tensor, angles: Tensor, eps: float, value: Tensor) -> Turned:
    """The bound of heads x [T, heads, D] with cosines and sines [T, R]; `value` is the reference's.

    The sum of squares, eps and the root are one error for a head: it scales the result. The rest is for each product alone,
    whose factor 1 + weight may also be taken as a head plus weight times that head.
    """
    half = angles.shape[-1] // 2
    cos, sin = angles.double().abs()[:, None].chunk(2, dim=-1)
    unit = normed(x, torch.zeros_like(weight), eps).abs()
    errors = unit * ((DIVISION + 3) * (1 + weight.double()).abs() + weight.double().abs())
    first, second = errors[..., :half], errors[..., half : 2 * half]
    rotated = torch.cat([first * cos + second * sin, second * cos + first * sin], dim=-1)
    own = torch.cat([rotated + value[..., : 2 * half].abs(), errors[..., 2 * half :]], dim=-1) * U32
    common = (x.shape[-1] + 1) / 2 * U32 + RSQRT
    return Turned(value, (common * value.abs() + own) * (1 + 2.0**-10) + FLUSHED)


def nearest(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The number of `dtype` nearest to each fp64 x, ties to even; fp8 saturates, wider formats overflow to infinity."""
    step = 2 * half_ulp(x, dtype)
    rounded = (x / step).round() * step
    largest = FORMATS[dtype].largest
    if dtype.itemsize == 1:
        return rounded.clamp(-largest, largest)
    return torch.where(rounded.abs() > largest, rounded.sign() * torch.inf, rounded)


@dataclass(frozen=True)
class Stored:
    """What stands in one destination, and how it may have come there."""

    actual: Tensor
    turned: Turned
    dtype: torch.dtype
    model: torch.dtype
    """What `rounded` rounds to before it rounds to an fp8 dtype."""
    scale: float = 1.0
    """What numbers are divided by before they are stored."""

    def emitted(self, share: Tensor | float, rule: Emission) -> Tensor:
        """What is stored where arithmetic errs by this share (-1 to 1) of its bound; it rises with the share."""
        x = self.turned.value + share * self.turned.bound
        if rule == "rounded" and self.dtype.itemsize == 1:
            x = nearest(x, self.model)
        if self.scale != 1.0:
            x = x / self.scale
            x = x + share * SCALING * x.abs()
        return nearest(x, self.dtype)

    def cut(self, which: Tensor) -> Stored:
        """The elements that a mask or an index over the first dimensions names."""
        return replace(self, actual=self.actual[which], turned=Turned(self.turned.value[which], self.turned.bound[which]))

    def shares(self, rule: Emission) -> Tensor:
        """How much of its bound each element needs to be explained, above 1 where all of it does not do."""
        right = self.emitted(0.0, rule)
        used = torch.zeros_like(right)
        off = self.actual.double() != right
        if bool(off.any()):
            used[off] = self.cut(off)._needed(right[off], rule)
        return used

    def _needed(self, right: Tensor, rule: Emission) -> Tensor:
        """Likewise, of elements [n] that are not `right`."""
        actual = self.actual.double()
        side = 2.0 * (actual > right).double() - 1.0
        reached = (actual - self.emitted(side, rule)) * side <= 0
        scale = self.scale
        room = self.turned.bound / scale + half_ulp(self.turned.value / scale, self.dtype)
        used = ((actual - self.turned.value / scale).abs() / room).nan_to_num(nan=LOST, posinf=LOST).clamp(1.001, LOST)
        if bool(reached.any()):
            used[reached] = self.cut(reached)._least(side[reached], rule)
        return used

    def _least(self, side: Tensor, rule: Emission) -> Tensor:
        """The least share that explains elements which the whole bound explains."""
        low, high = torch.zeros_like(side), torch.ones_like(side)
        for _ in range(12):
            middle = (low + high) / 2
            enough = (self.actual.double() - self.emitted(side * middle, rule)) * side <= 0
            low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
        return high


LOST = 1e9
"""Stands for NaN and infinity where a number belongs."""


def explained(stored: Mapping[str, Stored], rules: tuple[Emission, ...]) -> dict[str, Tensor]:
    """The shares of each destination, by the rule of emission that explains it best."""
    found = {}
    for name, each in stored.items():
        tried = [each.shares(rule) for rule in (rules if each.dtype.itemsize == 1 else rules[:1])]
        found[name] = min(tried, key=lambda used: float(used.max()) if used.numel() else 0.0)
    return found
