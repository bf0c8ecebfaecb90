"""One tile of indexer logits, which the kernels over windows and over pages share."""

from __future__ import annotations

import triton
import triton.language as tl

from m3check.kernels.triton.dequantise import operand


@triton.jit
def weighed_tile(
    q, stride_qh, stride_qd, weights, stride_wh, keys, stride_kd, seen, scale, heads,
    D: tl.constexpr, HEADS: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Σ_h weight · max(0, scale · q·k) [KEYS] fp32, from pointers to a query's heads and to each key's channels."""
    d = tl.arange(0, D).to(tl.int64)
    h = tl.arange(0, HEADS).to(tl.int64)
    live = h < heads
    queries = tl.load(q + (h * stride_qh)[:, None] + (d * stride_qd)[None, :], mask=live[:, None], other=0)
    k = tl.load(keys[:, None] + (d * stride_kd)[None, :], mask=seen[:, None], other=0)
    sums = tl.dot(operand(queries, FORM, tl.bfloat16), tl.trans(operand(k, FORM, tl.bfloat16)), out_dtype=tl.float32)
    weight = tl.load(weights + h * stride_wh, mask=live, other=0.0)
    return tl.sum(tl.maximum(sums * scale[None, :], 0.0) * weight[:, None], 0)
