"""Which request a query token belongs to, found inside the kernel, so that grids depend on shapes alone."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def request_of(token, cu_seqlens_q, requests, STEPS: tl.constexpr):
    """How many requests end at or before each query token: its request, or `requests` where it belongs to none.

    STEPS is the bit length of `requests`; a binary search that also steps over requests without queries.
    """
    found = token * 0
    for s in tl.static_range(STEPS):
        probe = found + (1 << (STEPS - 1 - s))
        end = tl.load(cu_seqlens_q + probe, mask=probe <= requests, other=2147483647)
        found = tl.where(end <= token, probe, found)
    return found
