"""`index_decode_score` by vLLM's CuteDSL kernel, and `index_decode`: that or Triton's scoring, then sparse_topk_select."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from m3check.kernels.fmha_sm100.index_score import indexed, unified
from m3check.kernels.fmha_sm100.index_topk import select
from m3check.kernels.fmha_sm100.interface import Interface
from m3check.types import Case

if TYPE_CHECKING:
    from torch import Tensor

SCORE_NAME = "minimax_m3_index_decode_score_cutedsl"
NAME = f"{SCORE_NAME} + sparse_topk_select"

WIDEST = 32
"""Index heads times query tokens of the widest tile that CuteDSL scores."""


def score_adapter(interface: Interface) -> Any:
    """The function of index_decode_score: it writes plain scores, nothing forced, into the buffer that it is given."""
    score = interface.decode_score
    assert score is not None

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
        max_decode_query_len: int,
        score_out: Tensor,
    ) -> Tensor:
        if not idx_q.shape[0] or not score_out.shape[2]:  # no query, or none that sees a block
            return score_out
        written: Tensor = score(
            idx_q,
            index_kv_cache,
            block_table,
            seq_lens,
            max_seq_len,
            init_blocks,
            local_blocks,
            num_kv_heads,
            decode_query_len,
            max_decode_query_len,
            score_out=score_out,
        )
        return written

    return index_decode_score


def adapter(interface: Interface, score: Callable[..., Any]) -> Any:
    """The function of index_decode; `score` has the keywords of index_decode_score: CuteDSL's, or Triton's."""

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
        max_decode_query_len: int,
        out: Tensor | None = None,
    ) -> Tensor:
        import torch

        scores = unified(idx_q)
        if idx_q.shape[0]:
            score(
                idx_q=idx_q,
                index_kv_cache=index_kv_cache,
                block_table=block_table,
                seq_lens=seq_lens,
                max_seq_len=max_seq_len,
                init_blocks=init_blocks,
                local_blocks=local_blocks,
                num_kv_heads=num_kv_heads,
                decode_query_len=decode_query_len,
                max_decode_query_len=max_decode_query_len,
                score_out=scores.transpose(0, 1),
            )
        draft = torch.arange(decode_query_len, device=seq_lens.device, dtype=seq_lens.dtype)
        position = (seq_lens[:, None] - decode_query_len + draft).flatten()
        return select(interface, scores, position, topk, init_blocks, local_blocks, out)

    return index_decode


def _drafts(case: Case) -> int:
    """Query tokens of a request that the kernel is compiled for."""
    return max([case.max_query_len, *case.query_lens])


def too_wide(case: Case) -> bool:
    """Whether a case's tile is too wide for CuteDSL; production scores with Triton then."""
    return case.kv_heads * _drafts(case) > WIDEST


def refusal(case: Case, dtypes: tuple[str, str]) -> str | None:
    """Why CuteDSL scoring cannot run a case."""
    if too_wide(case):
        return (
            f"{SCORE_NAME} takes at most {WIDEST} index heads times query tokens, got {case.kv_heads} x "
            f"{_drafts(case)}; production scores with Triton there (provider vllm)"
        )
    return indexed(SCORE_NAME, case, dtypes)
