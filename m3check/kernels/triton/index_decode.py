"""index_decode: block scores of the last query_len tokens of each request, and the blocks they attend to."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3check.kernels.triton import selection
from m3check.kernels.triton.index_decode_score import index_decode_score
from m3check.kernels.triton.profile import PROFILE
from m3check.kernels.triton.selection import launch, select_tile

__all__ = ["PROFILE", "index_decode", "warm_up"]


@triton.jit(
    do_not_specialize=["stride_oh", "tokens", "columns", "parts"],
    do_not_specialize_on_alignment=["partial", "out", "seq_lens"],
)
def index_decode_select_kernel(
    score, stride_st, stride_sh, stride_sk,
    partial, out, stride_ot, stride_oh, stride_ok,
    seq_lens, query_len, init_blocks, local_blocks, tokens, columns, parts,
    H: tl.constexpr, TOPK: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    STAGE: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of (query, head) pairs × parts of the blocks."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < tokens * H
    token = tl.minimum(row // H, tokens - 1)
    request = token // query_len
    seen = tl.load(seq_lens + request) - query_len + (token - request * query_len) + 1
    visible = tl.minimum((tl.maximum(seen, 0) + 127) // 128, columns)
    select_tile(
        row, token, row % H, live, visible, score, stride_st, stride_sh, stride_sk,
        partial, out, stride_ot, stride_oh, stride_ok, init_blocks, local_blocks, tl.program_id(1), parts,
        TOPK, SLOTS, COLUMNS, STAGE,
    )  # fmt: skip


def index_decode(
    idx_q: Tensor,
    index_kv_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    max_seq_len: int,
    topk: int,
    init_blocks: int,
    local_blocks: int,
    num_kv_heads: int,
    decode_query_len: int,
    max_decode_query_len: int | None = None,
    out: Tensor | None = None,
    score_out: Tensor | None = None,
) -> Tensor:
    """Ids [H, T, topk] int32 in `out` or a new tensor, as index_topk orders them; all -1 in a row without tokens.

    `score_out` receives what index_decode_score gives. Forced blocks are known by their position, not by the value in
    their score cell, so that a score beyond 1e30 does not displace them.
    """
    tokens, heads, _ = idx_q.shape
    score = index_decode_score(
        idx_q, index_kv_cache, block_table, seq_lens, max_seq_len, init_blocks, local_blocks, num_kv_heads,
        decode_query_len, max_decode_query_len, score_out,
    )  # fmt: skip
    if out is None:
        out = torch.empty(heads, tokens, topk, dtype=torch.int32, device=idx_q.device)
    out = out[:, :tokens]
    launch(index_decode_select_kernel, score, out, topk, (seq_lens, decode_query_len, init_blocks, local_blocks))
    return out


def warm_up(topk: int, out: Tensor | None = None, **call: Any) -> None:
    """Before serving: compile for contexts of every length. The keywords are those of a call of any size.

    Raises ValueError for one without a query.
    """
    arguments = (call["seq_lens"], call["decode_query_len"], call["init_blocks"], call["local_blocks"])
    selection.warm_up(index_decode_select_kernel, index_decode_score(**call), out, topk, arguments)
