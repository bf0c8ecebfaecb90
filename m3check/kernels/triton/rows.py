"""Which request a query token belongs to, found inside the kernel, so that grids depend on shapes alone."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def request_of(token, cu_seqlens_q, requests, steps):
    """How many requests end at or before each query token: its request, or `requests` where it belongs to none.

    `steps` is the bit length of `requests`; a binary search that also steps over requests without queries. Indices are
    clamped rather than loads masked: Triton 3.6 gives a chain of masked loads two layouts on gfx942 and fails.
    """
    found = token * 0
    for s in range(steps):
        probe = found + (1 << (steps - 1 - s))
        end = tl.load(cu_seqlens_q + tl.minimum(probe, requests))
        found = tl.where((probe <= requests) & (end <= token), probe, found)
    return found
