"""paged_mqa_logits: fp8 indexer logits of the last next_n tokens of each request, keys and scales out of one page."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3check.kernels.triton import tiles
from m3check.kernels.triton.dequantise import codes
from m3check.kernels.triton.logits import weighed_tile
from m3check.kernels.triton.profile import PROFILE

__all__ = ["PROFILE", "paged_mqa_logits"]


@triton.jit(do_not_specialize=["columns", "stride_lt"])
def paged_mqa_logits_kernel(
    q, stride_qr, stride_qn, stride_qh, stride_qd, cache, scales, stride_cp, stride_sp, weights, stride_wt, stride_wh,
    context_lens, table, stride_tr, logits, stride_lt, stride_ln, columns, next_n, heads,
    PAGE: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Grid: queries × tiles of keys; `cache` is the pages as codes, `scales` as fp32, strides in elements of each."""
    query = tl.program_id(0).to(tl.int64)
    request = query // next_n
    token = tl.program_id(1).to(tl.int64) * KEYS + tl.arange(0, KEYS)
    draft = query % next_n
    last = tl.load(context_lens + request) - next_n + draft
    seen = token <= last
    out = logits + query * stride_lt + token * stride_ln
    if tl.program_id(1) * KEYS > last:
        tl.store(out, tl.full([KEYS], float("-inf"), tl.float32), mask=token < columns)
    else:
        page = tl.load(table + request * stride_tr + token // PAGE, mask=seen, other=0).to(tl.int64)
        scale = tl.load(scales + page * stride_sp + PAGE * D // 4 + token % PAGE, mask=seen, other=0.0)
        sums = weighed_tile(
            q + request * stride_qr + draft * stride_qn, stride_qh, stride_qd, weights + query * stride_wt, stride_wh,
            cache + page * stride_cp + token % PAGE * D, 1, seen, scale, heads, D, HEADS, FORM,
        )  # fmt: skip
        tl.store(out, tl.where(seen, sums, float("-inf")), mask=token < columns)


def paged_mqa_logits(
    q: Tensor, kv_cache: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor, max_model_len: int,
    logits_out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Logits [R · next_n, max_model_len] fp32 of q [R, next_n, H, D]; -inf past what each query sees.

    kv_cache [pages, P, 1, D + 4] uint8: a page holds P · D bytes of keys, in q's fp8 dtype, and then P fp32 scales.
    The logits are written into `logits_out` where there is one, of any strides.
    """
    requests, next_n, heads, dim = q.shape
    page = kv_cache.shape[1]
    shape, device = (requests * next_n, max_model_len), q.device
    logits = torch.empty(shape, dtype=torch.float32, device=device) if logits_out is None else logits_out
    if not logits.numel():
        return logits
    queries, form = codes(q)
    pages = kv_cache.shape[0]
    raw = kv_cache.as_strided((pages, page * (dim + 4)), (kv_cache.stride(0), 1))
    tile = tiles.logit_keys()
    paged_mqa_logits_kernel[(requests * next_n, triton.cdiv(max_model_len, tile))](
        queries, *queries.stride(), raw, raw.view(torch.float32), raw.stride(0), raw.stride(0) // 4,
        weights, *weights.stride(), context_lens, block_table, block_table.stride(0), logits, *logits.stride(),
        max_model_len, next_n, heads, page, dim, tiles.head_rows(heads), tile, form, num_warps=4,
    )  # fmt: skip
    return logits
