"""index_decode_score: block scores of the last query_len tokens of each request, forced blocks marked in their cells."""

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

__all__ = ["PROFILE", "index_decode_score"]


@triton.jit(do_not_specialize=["columns", "parts"], do_not_specialize_on_alignment=["table", "seq_lens"])
def index_decode_score_kernel(
    idx_q, stride_qt, stride_qh, stride_qd,
    cache, stride_cp, stride_ct, stride_cd,
    table, stride_tr, stride_tc,
    score, stride_st, stride_sh, stride_sk,
    seq_lens, query_len, columns, init_blocks, local_blocks, parts,
    H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    Q_FORM: tl.constexpr, K_FORM: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of (query, head) pairs × requests × parts of the blocks."""
    request = tl.program_id(1)
    seq_len = tl.load(seq_lens + request)
    score_tile(
        idx_q, stride_qt, stride_qh, stride_qd, cache, stride_cp, stride_ct, stride_cd, table, stride_tr, stride_tc,
        score, stride_st, stride_sh, stride_sk,
        request, request * query_len, query_len, seq_len - query_len, seq_len, columns, init_blocks, local_blocks,
        tl.program_id(2), parts,
        H, D, ROWS, KEYS, Q_FORM, K_FORM, DTYPE, True,
    )  # fmt: skip


def index_decode_score(
    idx_q: Tensor,
    index_kv_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    max_seq_len: int,
    init_blocks: int,
    local_blocks: int,
    num_kv_heads: int,
    decode_query_len: int,
    max_decode_query_len: int | None = None,
    score_out: Tensor | None = None,
) -> Tensor:
    """Scores [H, T, >= K] in `score_out` or a new tensor; visible forced cells hold 1e30 (init) or 1e29 (local, wins).

    Rows are request-major, T = R · decode_query_len; cells of invisible blocks are -inf or left alone, and those of a
    request without tokens are not written.
    """
    tokens, heads, dim = idx_q.shape
    requests = block_table.shape[0]
    if heads != num_kv_heads:
        raise ValueError(f"idx_q has {heads} heads, wanted num_kv_heads = {num_kv_heads}")
    if tokens != requests * decode_query_len:
        raise ValueError(f"idx_q has {tokens} tokens, wanted {requests} requests · decode_query_len {decode_query_len}")
    if max_decode_query_len is not None and max_decode_query_len < decode_query_len:
        raise ValueError(f"max_decode_query_len {max_decode_query_len} is less than decode_query_len {decode_query_len}")
    if score_out is None:
        columns = -(-max(1, blocks(max_seq_len)) // 16) * 16
        score_out = torch.empty(heads, tokens, columns, dtype=torch.float32, device=idx_q.device)
    if tokens == 0:
        return score_out
    dtype = tiles.compute_dtype(idx_q, index_kv_cache)
    rows = tiles.score_rows(decode_query_len * heads, dtype)
    row_tiles = triton.cdiv(decode_query_len * heads, rows)
    parts = tiles.splits(row_tiles * requests, triton.cdiv(blocks(max_seq_len), 4))
    (q, q_form), (cache, k_form) = codes(idx_q), codes(index_kv_cache)
    index_decode_score_kernel[(row_tiles, requests, parts)](
        q, *q.stride(), cache, *cache.stride(), block_table, *block_table.stride(),
        score_out, score_out.stride(1), score_out.stride(0), score_out.stride(2),
        seq_lens, decode_query_len, min(score_out.shape[2], block_table.shape[1]), init_blocks, local_blocks, parts,
        heads, dim, rows, tiles.score_keys(dtype), q_form, k_form, tiles.TL_DTYPES[dtype],
        num_warps=4, num_stages=tiles.stages(dtype),
    )  # fmt: skip
    return score_out
