"""sparse_pa_table: the 16-token pages that a paged attention walks for each query's list of blocks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3check.kernels.triton.profile import PROFILE

__all__ = ["PROFILE", "sparse_pa_table"]


@triton.jit
def sparse_pa_table_kernel(
    ids, stride_it, stride_ik, block_table, stride_br, requests, positions, pages, stride_pt, context, query_len,
    page_stride,
    TOPK: tl.constexpr, SLOTS: tl.constexpr, UNIFORM: tl.constexpr,
):  # fmt: skip
    """Grid: queries. UNIFORM: `positions` holds the visible lengths of requests that have `query_len` queries each."""
    row = tl.program_id(0)
    if UNIFORM:
        request = row // query_len
        position = tl.load(positions + request) - query_len + row % query_len
    else:
        request = tl.load(requests + row)
        position = tl.load(positions + row)
    slot = tl.arange(0, SLOTS)
    block = tl.load(ids + row.to(tl.int64) * stride_it + slot * stride_ik, mask=slot < TOPK, other=-1)
    own = position // 128  # at most 0 in a dead row, which sees nothing
    earlier = (block >= 0) & (block < own)
    mine = (block == own) & (position >= 0)
    walked = earlier | mine
    before = earlier.to(tl.int32)
    place = tl.where(mine, tl.sum(before), tl.cumsum(before) - 1)
    page = tl.load(block_table + request.to(tl.int64) * stride_br + block, mask=walked, other=0)
    part = tl.arange(0, 8)
    line = pages + row.to(tl.int64) * stride_pt
    tl.store(line + place[:, None] * 8 + part[None, :], (page * page_stride)[:, None] + part[None, :], mask=walked[:, None])
    cell = tl.arange(0, SLOTS * 8)
    used = tl.sum(walked.to(tl.int32)) * 8
    tl.store(line + cell, tl.zeros_like(cell), mask=(cell >= used) & (cell < TOPK * 8))
    seen = tl.where(tl.sum(mine.to(tl.int32)) > 0, position % 128 + 1, 0)
    tl.store(context + row, tl.sum(before) * 128 + seen)


def launch(
    topk_idx: Tensor, block_table: Tensor, requests: Tensor, positions: Tensor, query_len: int, page_stride: int,
    uniform: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """New tensors (table [T, topk · 8] int32, context lengths [T] int32) for the lists of one head."""
    if topk_idx.shape[0] != 1:
        raise ValueError(f"a table of pages is for one KV head, got {topk_idx.shape[0]}")
    _, tokens, topk = topk_idx.shape
    pages = torch.empty(tokens, topk * 8, dtype=torch.int32, device=topk_idx.device)
    context = torch.empty(tokens, dtype=torch.int32, device=topk_idx.device)
    if tokens:
        sparse_pa_table_kernel[(tokens,)](
            topk_idx, topk_idx.stride(1), topk_idx.stride(2), block_table, block_table.stride(0), requests, positions,
            pages, pages.stride(0), context, query_len, page_stride,
            TOPK=topk, SLOTS=triton.next_power_of_2(topk), UNIFORM=uniform, num_warps=1,
        )  # fmt: skip
    return pages, context


def sparse_pa_table(
    topk_idx: Tensor, block_table: Tensor, query_req_id: Tensor, query_abs_pos: Tensor, block_page_stride: int
) -> tuple[Tensor, Tensor]:
    """(table [T, topk · 8] int32, context lengths [T] int32); ids that are negative or not visible are left out.

    Raises ValueError where there is more than one head.
    """
    return launch(topk_idx, block_table, query_req_id, query_abs_pos, 1, block_page_stride, False)
