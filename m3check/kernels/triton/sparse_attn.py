"""sparse_attn: causal softmax attention of prefill queries over the tokens of their listed blocks."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from m3check.kernels.triton import scales, tiles
from m3check.kernels.triton.attention import attend, normalised
from m3check.kernels.triton.dequantise import codes
from m3check.kernels.triton.profile import PROFILE
from m3check.kernels.triton.rows import request_of

__all__ = ["PROFILE", "sparse_attn"]


@triton.jit(
    do_not_specialize=["stride_ih", "requests", "steps"],
    do_not_specialize_on_alignment=["ids", "table", "cu_seqlens_q", "seq_lens", "prefix_lens"],
)
def sparse_attn_kernel(
    q, stride_qt, stride_qh, stride_qd,
    cache, stride_cp, stride_ch, stride_ct, stride_cd,
    ids, stride_ih, stride_it, stride_ik,
    table, stride_tr, stride_tc,
    output, stride_ot, stride_oh, stride_od,
    k_scale, stride_kh, v_scale, stride_vh,
    cu_seqlens_q, seq_lens, prefix_lens, requests, steps, scale_log2,
    G: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, KEYS: tl.constexpr, TOPK: tl.constexpr, SLOTS: tl.constexpr,
    FORM: tl.constexpr, SCALES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Grid: query tokens × KV heads; one program takes all query heads of its KV head."""
    token = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    request = request_of(token, cu_seqlens_q, requests, steps)
    if request < requests:
        position = tl.load(prefix_lens + request) + token - tl.load(cu_seqlens_q + request)
        kv_len = tl.minimum(position + 1, tl.load(seq_lens + request))
        member = tl.arange(0, ROWS).to(tl.int64)
        head = kv_head * G + member
        d = tl.arange(0, D).to(tl.int64)
        mask = (member < G)[:, None]
        queries = tl.load(
            q + token * stride_qt + (head * stride_qh)[:, None] + (d * stride_qd)[None, :], mask=mask, other=0
        )
        acc, _, total = attend(
            queries.to(DTYPE), kv_len, kv_head, ids + kv_head * stride_ih + token * stride_it, stride_ik, 0, TOPK,
            cache, stride_cp, stride_ch, stride_ct, stride_cd, table + request * stride_tr, stride_tc,
            k_scale, stride_kh, v_scale, stride_vh, scale_log2, D, KEYS, SLOTS, FORM, SCALES, DTYPE,
        )  # fmt: skip
        at = token * stride_ot + (head * stride_oh)[:, None] + (d * stride_od)[None, :]
        tl.store(output + at, normalised(acc, total).to(output.dtype.element_ty), mask=mask)


def sparse_attn(
    q: Tensor,
    kv_cache: Tensor,
    topk_idx: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    prefix_lens: Tensor,
    max_query_len: int,
    num_kv_heads: int,
    sm_scale: float,
    output: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Write attention of q [T, Hq, D] over the listed blocks into `output`; zeros where a row lists no visible block."""
    tokens, heads, dim = q.shape
    if heads % num_kv_heads:
        raise ValueError(f"q has {heads} heads, wanted a multiple of num_kv_heads = {num_kv_heads}")
    if tokens == 0:
        return
    cache, form = codes(kv_cache)
    mode = scales.mode(form, kv_cache, k_scale, v_scale)
    dtype = tiles.compute_dtype(q, kv_cache)
    gqa, topk, requests = heads // num_kv_heads, topk_idx.shape[2], block_table.shape[0]
    sparse_attn_kernel[(tokens, num_kv_heads)](
        q, *q.stride(), cache, *cache.stride(), topk_idx, *topk_idx.stride(), block_table, *block_table.stride(),
        output, *output.stride(), k_scale, k_scale.stride(0) if k_scale is not None else 0,
        v_scale, v_scale.stride(0) if v_scale is not None else 0,
        cu_seqlens_q, seq_lens, prefix_lens, requests, requests.bit_length(), sm_scale * math.log2(math.e),
        gqa, tiles.head_rows(gqa), dim, tiles.attention_keys(dtype), topk, tiles.power_of_two(topk),
        form, mode, tiles.TL_DTYPES[dtype], num_warps=4, num_stages=tiles.stages(dtype),
    )  # fmt: skip
