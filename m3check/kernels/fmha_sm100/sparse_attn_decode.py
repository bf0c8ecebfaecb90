"""`sparse_attn_decode` by vLLM's CUTLASS decode (msa_cutlass_sparse_decode), which production takes on request only.

It attends with fp8_e4m3fn queries. The profile says so (`queries`), so the case's are rounded before anybody sees them, and
the conversion here is exact. Its plan is made for another batch of the same shape and then brought up to date, as in
production, which keeps one for each shape.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from m3check.kernels.calls import BrokenContract
from m3check.kernels.fmha_sm100 import data
from m3check.kernels.fmha_sm100.interface import Interface
from m3check.kernels.library import dense
from m3check.types import BLOCK, Case

if TYPE_CHECKING:
    from torch import Tensor

NAME = "msa_cutlass_sparse_decode"

FEWEST = 16
"""Requests from which on production takes it."""


def adapter(interface: Interface) -> Any:
    """The op's function."""
    prepare, run, plan_cache = interface.prepare_decode, interface.attend_decode, interface.plan_cache
    assert prepare is not None
    assert run is not None
    assert plan_cache is not None

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
        import torch

        if not q.shape[0]:
            return
        table, cache = block_table.contiguous(), plan_cache()

        def prepared(lengths: Tensor) -> Any:
            return prepare(
                table,
                lengths,
                lengths.cpu(),
                decode_query_len,
                num_q_heads=q.shape[1],
                num_kv_heads=num_kv_heads,
                page_size=BLOCK,
                topk_blocks=topk_idx.shape[2],
                plan_cache=cache,
            )

        before = prepared(seq_lens.flip(0))
        metadata = prepared(seq_lens)
        fault = data.decode_fault(metadata, before, table, seq_lens, decode_query_len)
        if fault is not None:
            raise BrokenContract(fault)
        with dense(output) as out:
            run(
                q.to(torch.float8_e4m3fn).contiguous(),
                kv_cache,
                topk_idx.transpose(0, 1).contiguous(),
                out,
                metadata,
                scale=sm_scale,
                q_scale_float=1.0,
                k_scale_float=1.0 if k_scale is None else float(k_scale),
                v_scale_float=1.0 if v_scale is None else float(v_scale),
            )

    return sparse_attn_decode


def refusal(case: Case) -> str | None:
    """Why CUTLASS decode cannot run a case, or production would not have it run."""
    if case.topk != 16:
        return f"{NAME} needs topk 16, got {case.topk}"
    if case.head_dim != BLOCK:
        return f"{NAME} needs head_dim 128, got {case.head_dim}"
    if case.dtype != "bf16" or case.cache_dtype != "fp8_e4m3fn":
        return f"{NAME} takes bf16 queries with an fp8_e4m3fn cache, got {case.dtype} with {case.cache_dtype}"
    if case.scales == "token":
        return f"{NAME} takes one k_scale and one v_scale, not one for each token"
    if case.kv_heads > 4 or case.heads > 64:
        return f"{NAME} takes at most 4 KV heads and 64 query heads, got {case.kv_heads} and {case.heads}"
    if case.op != "decode" and case.ids != "ascending":
        return f"{NAME} reads ids in ascending order with -1 at the end, got ids={case.ids}"
    if max(case.query_lens, default=0) > 32 or case.total_queries * case.heads > 65536:
        return f"{NAME} takes at most 32 query tokens a request and 65,536 rows of query heads"
    if len(case.query_lens) < FEWEST:
        return f"{NAME} runs from {FEWEST} requests on, got {len(case.query_lens)}; production decodes with Triton below"
    return None
