"""sparse_attn_decode: attention of the last query_len tokens of each request, split over the listed blocks and merged."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3check.kernels.triton import scales, tiles
from m3check.kernels.triton.attention import attend, normalised
from m3check.kernels.triton.dequantise import codes
from m3check.kernels.triton.profile import PROFILE

__all__ = ["PROFILE", "sparse_attn_decode", "warm_up"]


@triton.jit(
    do_not_specialize=["stride_ih", "stride_sp", "share"], do_not_specialize_on_alignment=["ids", "table", "seq_lens"]
)
def sparse_attn_decode_kernel(
    q, stride_qt, stride_qh, stride_qd,
    cache, stride_cp, stride_ch, stride_ct, stride_cd,
    ids, stride_ih, stride_it, stride_ik,
    table, stride_tr, stride_tc,
    output, stride_op, stride_ot, stride_oh, stride_od,
    tops, totals, stride_sp,
    k_scale, stride_kh, v_scale, stride_vh,
    seq_lens, query_len, share, scale_log2,
    G: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, KEYS: tl.constexpr, TOPK: tl.constexpr, SLOTS: tl.constexpr,
    SPLIT: tl.constexpr, FORM: tl.constexpr, SCALES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Grid: query tokens × KV heads × parts of `share` slots; where SPLIT, `output` takes unnormalised fp32 parts."""
    tl.assume(share > 0)  # else the compiler divides slots as signed numbers, which takes a fifth more registers
    token = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2).to(tl.int64)
    request = token // query_len
    kv_len = tl.load(seq_lens + request) - query_len + (token - request * query_len) + 1
    member = tl.arange(0, ROWS).to(tl.int64)
    head = kv_head * G + member
    d = tl.arange(0, D).to(tl.int64)
    mask = (member < G)[:, None]
    at = token * stride_qt + (head * stride_qh)[:, None] + (d * stride_qd)[None, :]
    queries = tl.load(q + at, mask=mask, other=0)
    acc, top, total = attend(
        queries.to(DTYPE), kv_len, kv_head, ids + kv_head * stride_ih + token * stride_it, stride_ik,
        part * share, tl.minimum(part * share + share, TOPK),
        cache, stride_cp, stride_ch, stride_ct, stride_cd, table + request * stride_tr, stride_tc,
        k_scale, stride_kh, v_scale, stride_vh, scale_log2, D, KEYS, SLOTS, FORM, SCALES, DTYPE,
    )  # fmt: skip
    if SPLIT:
        heads = tl.num_programs(1) * G
        tl.store(tops + part * stride_sp + token * heads + head, top, mask=member < G)
        tl.store(totals + part * stride_sp + token * heads + head, total, mask=member < G)
    else:
        acc = normalised(acc, total)
    at = part * stride_op + token * stride_ot + (head * stride_oh)[:, None] + (d * stride_od)[None, :]
    tl.store(output + at, acc.to(output.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "parts"])
def merge_kernel(
    sums, tops, totals, rows, output, stride_ot, stride_oh, stride_od, heads, parts, ROWS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Join the parts of rows (token, head): sums [parts, rows, D], tops and totals [parts, rows], all contiguous fp32."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, D).to(tl.int64)
    live = row < rows
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.full([ROWS], 0.0, tl.float32)
    acc = tl.full([ROWS, D], 0.0, tl.float32)
    for part in range(parts):
        at = part * rows + row
        part_top = tl.load(tops + at, mask=live, other=float("-inf"))
        new_top = tl.maximum(top, part_top)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        decay, weight = tl.exp2(top - base), tl.exp2(part_top - base)
        total = total * decay + tl.load(totals + at, mask=live, other=0.0) * weight
        sum_ = tl.load(sums + (at * D)[:, None] + d[None, :], mask=live[:, None], other=0.0)
        acc = acc * decay[:, None] + sum_ * weight[:, None]
        top = new_top
    at = ((row // heads) * stride_ot + (row % heads) * stride_oh)[:, None] + (d * stride_od)[None, :]
    tl.store(output + at, normalised(acc, total).to(output.dtype.element_ty), mask=live[:, None])


def sparse_attn_decode(
    q: Tensor,
    kv_cache: Tensor,
    topk_idx: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    num_kv_heads: int,
    sm_scale: float,
    output: Tensor,
    decode_query_len: int,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Write attention of q [T, Hq, D], T = R · decode_query_len, into `output`; zeros in rows that see no listed block."""
    _launch(
        tiles.splits(len(q) * num_kv_heads, topk_idx.shape[2]), q, kv_cache, topk_idx, block_table, seq_lens, num_kv_heads,
        sm_scale, output, decode_query_len, k_scale, v_scale,
    )  # fmt: skip


def warm_up(**call: Any) -> None:
    """Before serving: compile lists in parts, which a few queries take, and whole ones, which many do.

    The keywords are those of a call of any size, whose results it leaves behind. Raises ValueError for one without a query.
    """
    if not len(call["q"]):
        raise ValueError("a warm-up needs a query")
    for most in (2, 1):
        _launch(most, **call)


def _launch(
    most: int, q: Tensor, kv_cache: Tensor, topk_idx: Tensor, block_table: Tensor, seq_lens: Tensor, num_kv_heads: int,
    sm_scale: float, output: Tensor, decode_query_len: int, k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Fill `output`, each list in `most` parts at most."""
    tokens, heads, dim = q.shape
    requests = block_table.shape[0]
    if heads % num_kv_heads:
        raise ValueError(f"q has {heads} heads, wanted a multiple of num_kv_heads = {num_kv_heads}")
    if tokens != requests * decode_query_len:
        raise ValueError(f"q has {tokens} tokens, wanted {requests} requests · decode_query_len {decode_query_len}")
    if tokens == 0:
        return
    cache, form = codes(kv_cache)
    mode = scales.mode(form, kv_cache, k_scale, v_scale)
    dtype = tiles.compute_dtype(q, kv_cache)
    gqa, topk = heads // num_kv_heads, topk_idx.shape[2]
    share = triton.cdiv(topk, most)
    parts = triton.cdiv(topk, share)
    rows = tokens * heads
    if parts > 1:
        sums = torch.empty(parts, tokens, heads, dim, dtype=torch.float32, device=q.device)
        # Not one tensor: a pointer into it would be aligned by the number of rows, which is compiled for.
        tops, totals = (torch.empty(parts, rows, dtype=torch.float32, device=q.device) for _ in range(2))
        to, to_strides = sums, sums.stride()
    else:
        tops = totals = to = output
        to_strides = (0, *output.stride())
    sparse_attn_decode_kernel[(tokens, num_kv_heads, parts)](
        q, *q.stride(), cache, *cache.stride(), topk_idx, *topk_idx.stride(), block_table, *block_table.stride(),
        to, *to_strides, tops, totals, rows, k_scale, k_scale.stride(0) if k_scale is not None else 0,
        v_scale, v_scale.stride(0) if v_scale is not None else 0,
        seq_lens, decode_query_len, share, sm_scale * math.log2(math.e),
        gqa, tiles.head_rows(gqa), dim, tiles.attention_keys(dtype), topk, tiles.power_of_two(topk), parts > 1,
        form, mode, tiles.TL_DTYPES[dtype], num_warps=4, num_stages=tiles.stages(dtype),
    )  # fmt: skip
    if parts > 1:
        tile = 64 if tiles.interpreted() else 8
        merge_kernel[(triton.cdiv(rows, tile),)](
            sums, tops, totals, rows, output, *output.stride(), heads, parts, tile, dim, num_warps=4
        )
