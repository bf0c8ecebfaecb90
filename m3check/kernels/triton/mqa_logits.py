"""mqa_logits: fp8 indexer logits of each query over a window of one tensor of keys."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3check.kernels.triton import tiles
from m3check.kernels.triton.dequantise import codes
from m3check.kernels.triton.logits import weighed_tile
from m3check.kernels.triton.profile import PROFILE

__all__ = ["PROFILE", "mqa_logits"]


@triton.jit(do_not_specialize=["stride_lt", "rows"])
def mqa_logits_kernel(
    q, stride_qt, stride_qh, stride_qd, k, stride_kt, stride_kd, k_scale, weights, stride_wt, stride_wh, starts, ends,
    logits, stride_lt, stride_ln, rows, heads,
    D: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Grid: queries × tiles of keys."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64) * KEYS + tl.arange(0, KEYS)
    seen = (row >= tl.load(starts + token)) & (row < tl.load(ends + token))
    scale = tl.load(k_scale + row, mask=seen, other=0.0)
    sums = weighed_tile(
        q + token * stride_qt, stride_qh, stride_qd, weights + token * stride_wt, stride_wh, k + row * stride_kt, stride_kd,
        seen, scale, heads, D, HEADS, FORM,
    )  # fmt: skip
    tl.store(logits + token * stride_lt + row * stride_ln, tl.where(seen, sums, float("-inf")), mask=row < rows)


def mqa_logits(
    q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, starts: Tensor, ends: Tensor, logits_out: Tensor | None = None
) -> Tensor:
    """Logits [T, N] fp32 of q [T, H, D] and k [N, D], fp8 with k_scale [N]; -inf outside [starts, ends) of each row.

    They are written into `logits_out` where there is one, of any strides.
    """
    tokens, heads, dim = q.shape
    shape, device = (tokens, k.shape[0]), q.device
    logits = torch.empty(shape, dtype=torch.float32, device=device) if logits_out is None else logits_out
    if not logits.numel():
        return logits
    queries, form = codes(q)
    keys, _ = codes(k)
    tile = tiles.logit_keys()
    mqa_logits_kernel[(tokens, triton.cdiv(k.shape[0], tile))](
        queries, *queries.stride(), keys, *keys.stride(), k_scale, weights, *weights.stride(), starts, ends,
        logits, *logits.stride(), k.shape[0], heads, dim, tiles.head_rows(heads), tile, form, num_warps=4,
    )  # fmt: skip
    return logits
