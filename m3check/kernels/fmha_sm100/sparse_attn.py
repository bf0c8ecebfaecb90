"""`sparse_attn` by build_k2q_csr and sparse_atten_func, called as vLLM's MSA implementation calls them in prefill.

It is given no k_scale and v_scale: production passes none, although its decode does multiply by them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from m3check.kernels.calls import BrokenContract
from m3check.kernels.fmha_sm100 import data
from m3check.kernels.fmha_sm100.interface import Interface, takes
from m3check.kernels.library import dense
from m3check.types import BLOCK, Case

if TYPE_CHECKING:
    from torch import Tensor

NAME = "sparse_atten_func"

SLOTS = (4, 8, 16, 32)
GROUPS = (1, 2, 4, 8, 16)


def adapter(interface: Interface) -> Any:
    """The op's function; given scales, it does without them, as production does."""

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
        if q.shape[0]:
            lengths = cu_seqlens_q, seq_lens, max_query_len
            attend(interface, q, kv_cache, topk_idx, block_table, lengths, num_kv_heads, sm_scale, output)

    return sparse_attn


def attend(
    interface: Interface,
    q: Tensor,
    kv_cache: Tensor,
    topk_idx: Tensor,
    block_table: Tensor,
    lengths: tuple[Tensor, Tensor, int],
    num_kv_heads: int,
    sm_scale: float,
    output: Tensor,
) -> None:
    """Turn the id lists round (which queries does a block serve?) and attend; lengths are summed as the builder does.

    Queries, page table and output are without gaps, as in production: for others MSA takes its older kernel, unasked.
    """
    assert interface.build_csr is not None
    assert interface.attend is not None
    import torch

    cu_seqlens_q, seq_lens, max_query_len = lengths
    ends = seq_lens.cumsum(0, dtype=torch.int32)
    cu_seqlens_k = torch.cat([ends.new_zeros(1), ends])
    max_seq_len = int(seq_lens.max())
    row_ptr, queries, schedule = interface.build_csr(
        topk_idx,
        cu_seqlens_q,
        cu_seqlens_k,
        BLOCK,
        total_k=0,
        max_seqlen_k=max_seq_len,
        max_seqlen_q=max_query_len,
        total_rows=int(((seq_lens + BLOCK - 1) // BLOCK).sum()),
        qhead_per_kv=q.shape[1] // num_kv_heads,
        return_schedule=True,
    )
    fault = data.csr_fault(row_ptr, queries, topk_idx, cu_seqlens_q, cu_seqlens_k)
    if fault is not None:
        raise BrokenContract(fault)
    keys, values = kv_cache.split(q.shape[2], dim=-1)
    with dense(output) as out:
        placed = {"out": out} if takes(interface.attend, "out") else {}
        attended = interface.attend(
            q.contiguous(),
            keys,
            values,
            row_ptr,
            queries,
            topK=topk_idx.shape[2],
            blk_kv=BLOCK,
            causal=True,
            softmax_scale=sm_scale,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max_query_len,
            max_seqlen_k=max_seq_len,
            page_table=block_table.contiguous(),
            seqused_k=seq_lens,
            schedule=schedule,
            **placed,
        )
        if not placed:  # MiniMax's own MSA
            out.copy_(attended)


def refusal(case: Case) -> str | None:
    """Why sparse_atten_func cannot run a case. Scales are the caller's to refuse: a dispatch runs it on a scaled cache."""
    if case.head_dim != BLOCK:
        return f"{NAME} needs head_dim 128, got {case.head_dim}"
    if case.topk not in SLOTS:
        return f"{NAME} needs topk 4, 8, 16 or 32, got {case.topk}"
    if case.gqa not in GROUPS:
        return f"{NAME} needs 1, 2, 4, 8 or 16 query heads for each KV head, got {case.gqa}"
    if case.dtype != "bf16" or case.cache_dtype not in ("bf16", "fp8_e4m3fn"):
        return f"{NAME} takes bf16 queries with a bf16 or fp8_e4m3fn cache, got {case.dtype} with {case.cache_dtype}"
    return None
