"""A slow kernel that hands integers to the next launch, which programmatic dependent launch may start before it ends."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

SPIN = 2000
"""Loads that wait for each other: some 0.3 ms, which no dependent kernel takes to its first load."""


@triton.jit
def produce_kernel(to, source, zero, count, SPIN: tl.constexpr, TILE: tl.constexpr):
    """One program. Lets dependents start at once, waits, and only then copies; `zero` is one 0 that nobody can foresee."""
    tl.extra.cuda.gdc_launch_dependents()
    at = tl.load(zero, volatile=True)
    for _ in range(SPIN):
        at = tl.load(zero + at, volatile=True)
    for start in range(0, count, TILE):
        place = start + tl.arange(0, TILE)
        value = tl.load(source + place, mask=place < count, other=0)
        tl.store(to + place, value + at, mask=place < count)


def produce(to: Tensor, source: Tensor, zero: Tensor) -> None:
    """Copy contiguous int32 `source` to `to`, slowly; needs a target with programmatic dependent launch."""
    produce_kernel[(1,)](to, source, zero, to.numel(), SPIN, 1024, num_warps=4, num_stages=1)
