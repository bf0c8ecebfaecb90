"""index_score: for each query and head, the largest q·k over the visible keys of each 128-token block (prefill)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3check.kernels.triton import tiles
from m3check.kernels.triton.dequantise import codes
from m3check.kernels.triton.profile import PROFILE
from m3check.kernels.triton.scoring import score_tile
from m3check.types import blocks

__all__ = ["PROFILE", "index_score"]


@triton.jit(
    do_not_specialize=["columns", "parts"],
    do_not_specialize_on_alignment=["table", "cu_seqlens_q", "seq_lens", "prefix_lens"],
)
def index_score_kernel(
    idx_q, stride_qt, stride_qh, stride_qd,
    cache, stride_cp, stride_ct, stride_cd,
    table, stride_tr, stride_tc,
    score, stride_st, stride_sh, stride_sk,
    cu_seqlens_q, seq_lens, prefix_lens, columns, parts,
    H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    Q_FORM: tl.constexpr, K_FORM: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of (query, head) pairs × requests × parts of the blocks."""
    request = tl.program_id(1)
    first_token = tl.load(cu_seqlens_q + request)
    query_len = tl.load(cu_seqlens_q + request + 1) - first_token
    score_tile(
        idx_q, stride_qt, stride_qh, stride_qd, cache, stride_cp, stride_ct, stride_cd, table, stride_tr, stride_tc,
        score, stride_st, stride_sh, stride_sk,
        request, first_token, query_len, tl.load(prefix_lens + request), tl.load(seq_lens + request), columns, 0, 0,
        tl.program_id(2), parts,
        H, D, ROWS, KEYS, Q_FORM, K_FORM, DTYPE, False,
    )  # fmt: skip


def index_score(
    idx_q: Tensor,
    index_kv_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    prefix_lens: Tensor,
    max_query_len: int,
    max_seq_len: int,
    num_kv_heads: int,
    score_out: Tensor | None = None,
) -> Tensor:
    """Scores [H, T, K] in `score_out` (K columns or more) or a new tensor, K = blocks(max_seq_len) rounded up to 16.

    Cells of invisible blocks are -inf or unwritten.
    """
    tokens, heads, dim = idx_q.shape
    if heads != num_kv_heads:
        raise ValueError(f"idx_q has {heads} heads, wanted num_kv_heads = {num_kv_heads}")
    columns = -(-max(1, blocks(max_seq_len)) // 16) * 16
    score = score_out
    if score is None:
        score = torch.empty(heads, tokens, columns, dtype=torch.float32, device=idx_q.device)
    requests = block_table.shape[0]
    if tokens == 0 or requests == 0:
        return score
    dtype = tiles.compute_dtype(idx_q, index_kv_cache)
    rows = tiles.score_rows(64, dtype)  # the most there are, whatever the batch: each number is compiled for
    row_tiles = triton.cdiv(max_query_len * heads, rows)
    parts = tiles.splits(row_tiles * requests, triton.cdiv(blocks(max_seq_len), 4))
    (q, q_form), (cache, k_form) = codes(idx_q), codes(index_kv_cache)
    index_score_kernel[(row_tiles, requests, parts)](
        q, *q.stride(), cache, *cache.stride(), block_table, *block_table.stride(),
        score, score.stride(1), score.stride(0), score.stride(2),
        cu_seqlens_q, seq_lens, prefix_lens, min(columns, block_table.shape[1]), parts,
        heads, dim, rows, tiles.score_keys(dtype), q_form, k_form, tiles.TL_DTYPES[dtype],
        num_warps=4, num_stages=tiles.stages(dtype),
    )  # fmt: skip
    return score
