"""The indexer's ops by msa_proxy_score (block scores, unscaled, nothing forced) and msa_topk_select (ascending ids)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from m3check.types import BLOCK, Case

if TYPE_CHECKING:
    from torch import Tensor

    from m3check.kernels.flashinfer import Interface

SLOTS = 16


def score(interface: Interface) -> Callable[..., Tensor]:
    """The function of index_score."""

    def index_score(
        idx_q: Tensor,
        index_kv_cache: Tensor,
        block_table: Tensor,
        cu_seqlens_q: Tensor,
        seq_lens: Tensor,
        prefix_lens: Tensor,
        max_query_len: int,
        max_seq_len: int,
    ) -> Tensor:
        lengths = cu_seqlens_q, seq_lens, max_query_len, max_seq_len
        return _scored(interface, idx_q, index_kv_cache, block_table, lengths).transpose(1, 2)

    return index_score


def topk(interface: Interface) -> Callable[..., Tensor]:
    """The function of index_topk."""

    def index_topk(
        score: Tensor,
        cu_seqlens_q: Tensor,
        prefix_lens: Tensor,
        topk: int,
        init_blocks: int,
        local_blocks: int,
        out: Tensor | None = None,
    ) -> Tensor:
        import torch

        rows = score.shape[1]
        first = (prefix_lens - cu_seqlens_q[:-1]).repeat_interleave(cu_seqlens_q.diff(), output_size=rows)
        position = first + torch.arange(rows, device=score.device, dtype=torch.int32)
        tile = torch.arange(score.shape[2], device=score.device)
        scores = score.where(tile < _valid_pages(position)[:, None], float("-inf"))  # which msa_topk_select asks for
        return _selected(interface, scores.transpose(1, 2).contiguous(), position, topk, init_blocks, local_blocks, out)

    return index_topk


def decode_score(interface: Interface) -> Callable[..., Tensor]:
    """The function of index_decode_score."""

    def index_decode_score(
        idx_q: Tensor,
        index_kv_cache: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        max_seq_len: int,
        init_blocks: int,
        local_blocks: int,
        decode_query_len: int,
    ) -> Tensor:
        lengths = _starts(seq_lens, decode_query_len), seq_lens, decode_query_len, max_seq_len
        return _scored(interface, idx_q, index_kv_cache, block_table, lengths).transpose(1, 2)

    return index_decode_score


def decode(interface: Interface) -> Callable[..., Tensor]:
    """The function of index_decode."""

    def index_decode(
        idx_q: Tensor,
        index_kv_cache: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        max_seq_len: int,
        topk: int,
        init_blocks: int,
        local_blocks: int,
        decode_query_len: int,
        out: Tensor | None = None,
    ) -> Tensor:
        import torch

        lengths = _starts(seq_lens, decode_query_len), seq_lens, decode_query_len, max_seq_len
        scores = _scored(interface, idx_q, index_kv_cache, block_table, lengths)
        draft = torch.arange(decode_query_len, device=seq_lens.device, dtype=torch.int32)
        position = (seq_lens[:, None] - decode_query_len + draft).flatten()
        return _selected(interface, scores, position, topk, init_blocks, local_blocks, out)

    return index_decode


def _starts(seq_lens: Tensor, query_len: int) -> Tensor:
    import torch

    return torch.arange(len(seq_lens) + 1, device=seq_lens.device, dtype=torch.int32) * query_len


def _scored(
    interface: Interface,
    idx_q: Tensor,
    index_kv_cache: Tensor,
    block_table: Tensor,
    lengths: tuple[Tensor, Tensor, int, int],
) -> Tensor:
    """Scores [H, K, T] of queries that end where their request does."""
    cu_seqlens_q, seq_lens, max_query_len, max_seq_len = lengths
    columns = -(-max_seq_len // BLOCK)
    if not idx_q.shape[0]:
        import torch

        return torch.empty(idx_q.shape[1], columns, 0, device=idx_q.device)
    scores: Tensor = interface.msa_proxy_score(
        idx_q,
        index_kv_cache.unsqueeze(1),
        cu_seqlens_q,
        page_table=block_table,
        seqused_k=seq_lens,
        causal=True,
        max_seqlen_q=max_query_len,
        max_k_tiles=columns,
    )
    return scores


def _valid_pages(position: Tensor) -> Tensor:
    """Blocks that a query at each position sees, int32; one for a padded row, which has no position."""
    import torch

    return (position.clamp(min=0) // BLOCK + 1).to(torch.int32)


def _selected(
    interface: Interface,
    scores: Tensor,
    position: Tensor,
    topk: int,
    init_blocks: int,
    local_blocks: int,
    out: Tensor | None,
) -> Tensor:
    """Ids [H, T, topk] of scores [H, K, T]; `position` [T] is each query's token position."""
    import torch

    heads, columns, rows = scores.shape
    ids = torch.empty(rows, heads, topk, dtype=torch.int32, device=scores.device)
    if rows:
        begin = min(init_blocks, columns, topk)
        interface.msa_topk_select(
            scores,
            topk,
            num_valid_pages=_valid_pages(position),
            force_begin_blocks=begin,
            force_end_blocks=min(local_blocks, topk - begin),
            output=ids,
        )
    if out is None:
        return ids.transpose(0, 1)
    out[:, :rows] = ids.transpose(0, 1)
    return out[:, :rows]


def score_refusal(case: Case, dtypes: tuple[str, str]) -> str | None:
    """Why msa_proxy_score cannot run a case."""
    if case.head_dim != BLOCK:
        return f"msa_proxy_score needs head_dim 128, got {case.head_dim}"
    queries, keys = dtypes
    same = queries == keys and queries in ("bf16", "fp16")
    if not same and (keys != "fp8_e4m3fn" or queries not in ("bf16", "fp16", "fp8_e4m3fn")):
        return f"msa_proxy_score takes bf16 or fp16 keys with such queries, or fp8_e4m3fn keys, got {queries} and {keys}"
    return compact("msa_proxy_score", case)


def topk_refusal(case: Case) -> str | None:
    """Why msa_topk_select cannot run a case."""
    if case.topk != SLOTS:
        return f"msa_topk_select needs topk 16, got {case.topk}"
    if case.init_blocks + case.local_blocks > SLOTS:
        return f"msa_topk_select forces at most 16 blocks, got {case.init_blocks} + {case.local_blocks}"
    return None


def compact(name: str, case: Case) -> str | None:
    """Why a kernel that addresses a cache as one block cannot read it."""
    if case.layout == "pool":
        return f"{name} reads a cache without gaps; layout=pool is one layer of a pool of several"
    return None
