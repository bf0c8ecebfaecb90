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


@triton.jit(do_not_specialize=["rows"])
def mqa_logits_kernel(
    q, stride_qt, stride_qh, k, stride_kt, k_scale, weights, stride_wt, starts, ends, logits, stride_lt, rows, heads,
    D: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Grid: queries × tiles of keys."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64) * KEYS + tl.arange(0, KEYS)
    seen = (row >= tl.load(starts + token)) & (row < tl.load(ends + token))
    scale = tl.load(k_scale + row, mask=seen, other=0.0)
    sums = weighed_tile(
        q + token * stride_qt, stride_qh, weights + token * stride_wt, k + row * stride_kt, seen, scale, heads,
        D, HEADS, FORM,
    )  # fmt: skip
    tl.store(logits + token * stride_lt + row, tl.where(seen, sums, float("-inf")), mask=row < rows)


def mqa_logits(q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """Logits [T, N] fp32 of q [T, H, D] and k [N, D], fp8 with k_scale [N]; -inf outside [starts, ends) of each row."""
    tokens, heads, dim = q.shape
    logits = torch.empty(tokens, k.shape[0], dtype=torch.float32, device=q.device)
    if not logits.numel():
        return logits
    queries, form = codes(q)
    keys, _ = codes(k)
    tile = tiles.logit_keys()
    mqa_logits_kernel[(tokens, triton.cdiv(k.shape[0], tile))](
        queries, queries.stride(0), queries.stride(1), keys, keys.stride(0), k_scale, weights, weights.stride(0),
        starts, ends, logits, logits.stride(0), k.shape[0], heads, dim, tiles.head_rows(heads), tile, form, num_warps=4,
    )  # fmt: skip
    return logits
