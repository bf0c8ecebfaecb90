"""index_topk: the blocks that each prefill query attends to: forced init and local blocks, then the highest scores."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3check.kernels.triton import selection
from m3check.kernels.triton.profile import PROFILE
from m3check.kernels.triton.rows import request_of
from m3check.kernels.triton.selection import launch, select_tile

__all__ = ["PROFILE", "index_topk", "warm_up"]


@triton.jit(
    do_not_specialize=["stride_oh", "requests", "steps", "tokens", "columns", "parts"],
    do_not_specialize_on_alignment=["partial", "out", "cu_seqlens_q", "prefix_lens"],
)
def index_topk_kernel(
    score, stride_st, stride_sh, stride_sk,
    partial, out, stride_ot, stride_oh, stride_ok,
    cu_seqlens_q, prefix_lens, requests, steps, init_blocks, local_blocks, tokens, columns, parts,
    H: tl.constexpr, TOPK: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    STAGE: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of (query, head) pairs × parts of the blocks."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = row // H
    found = request_of(token, cu_seqlens_q, requests, steps)
    live = (token < tokens) & (found < requests)
    request = tl.minimum(found, requests - 1)
    position = tl.load(prefix_lens + request) + token - tl.load(cu_seqlens_q + request)
    visible = tl.minimum((position + 128) // 128, columns)
    select_tile(
        row, token, row % H, live, visible, score, stride_st, stride_sh, stride_sk,
        partial, out, stride_ot, stride_oh, stride_ok, init_blocks, local_blocks, tl.program_id(1), parts,
        TOPK, SLOTS, COLUMNS, STAGE,
    )  # fmt: skip


def index_topk(
    score: Tensor,
    cu_seqlens_q: Tensor,
    prefix_lens: Tensor,
    max_query_len: int,
    topk: int,
    init_blocks: int,
    local_blocks: int,
    out: Tensor | None = None,
) -> Tensor:
    """Ids [H, T, topk] int32 in `out` or a new tensor: init blocks, local blocks, then by score; -1 in unused slots.

    A block that is both init and local ranks as local; equal scores go to the smaller id, NaN ranks lowest.
    """
    heads, tokens, _ = score.shape
    if out is None:
        out = torch.empty(heads, tokens, topk, dtype=torch.int32, device=score.device)
    out = out[:, :tokens]
    if prefix_lens.shape[0] == 0:
        return out
    launch(index_topk_kernel, score, out, topk, _arguments(cu_seqlens_q, prefix_lens, init_blocks, local_blocks))
    return out


def _arguments(cu_seqlens_q: Tensor, prefix_lens: Tensor, init_blocks: int, local_blocks: int) -> tuple[object, ...]:
    """What the kernel finds out from what a row sees."""
    requests = prefix_lens.shape[0]
    return cu_seqlens_q, prefix_lens, requests, requests.bit_length(), init_blocks, local_blocks


def warm_up(
    score: Tensor, cu_seqlens_q: Tensor, prefix_lens: Tensor, topk: int, init_blocks: int, local_blocks: int,
    out: Tensor | None = None, **_: Any,
) -> None:  # fmt: skip
    """Before serving: compile for contexts of every length. The keywords are those of a call of any size.

    Raises ValueError for one without a query.
    """
    arguments = _arguments(cu_seqlens_q, prefix_lens, init_blocks, local_blocks)
    selection.warm_up(index_topk_kernel, score, out, topk, arguments)
