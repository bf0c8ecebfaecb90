"""Attention by msa_sparse_attention and msa_sparse_decode_attention, which read the packed cache in place.

One k_scale goes into the softmax scale and one v_scale into the output, exactly; scales by token cannot be passed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from m3check.kernels.flashinfer.index import compact
from m3check.types import BLOCK, Case

if TYPE_CHECKING:
    from torch import Tensor

    from m3check.kernels.flashinfer import Interface


def prefill(interface: Interface) -> Callable[..., None]:
    """The function of sparse_attn."""

    def sparse_attn(
        q: Tensor,
        kv_cache: Tensor,
        topk_idx: Tensor,
        block_table: Tensor,
        cu_seqlens_q: Tensor,
        seq_lens: Tensor,
        prefix_lens: Tensor,
        sm_scale: float,
        output: Tensor,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> None:
        if q.shape[0]:
            operands, options = _arguments(q, kv_cache, topk_idx, block_table, seq_lens, sm_scale, k_scale, v_scale)
            output.copy_(interface.msa_sparse_attention(*operands, cu_seqlens_q, **options))

    return sparse_attn


def decode(interface: Interface) -> Callable[..., None]:
    """The function of sparse_attn_decode."""

    def sparse_attn_decode(
        q: Tensor,
        kv_cache: Tensor,
        topk_idx: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        sm_scale: float,
        output: Tensor,
        decode_query_len: int,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> None:
        if q.shape[0]:
            operands, options = _arguments(q, kv_cache, topk_idx, block_table, seq_lens, sm_scale, k_scale, v_scale)
            output.copy_(interface.msa_sparse_decode_attention(*operands, seqlen_q=decode_query_len, **options))

    return sparse_attn_decode


def _arguments(
    q: Tensor,
    kv_cache: Tensor,
    topk_idx: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    sm_scale: float,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """What both take; queries and lists are contiguous there."""
    keys, values = kv_cache.split(q.shape[2], dim=-1)
    options = {
        "page_table": block_table,
        "seqused_k": seq_lens,
        "causal": True,
        "softmax_scale": sm_scale if k_scale is None else sm_scale * float(k_scale),
        "v_global_scale": None if v_scale is None else float(v_scale),
    }
    return (q.contiguous(), keys, values, topk_idx.contiguous()), options


def refusal(op: str, case: Case) -> str | None:
    """Why the kernel of an op cannot run a case."""
    name = "msa_sparse_attention" if op == "sparse_attn" else "msa_sparse_decode_attention"
    most = 128 if op == "sparse_attn" else 16
    if case.head_dim != BLOCK:
        return f"{name} needs head_dim 128, got {case.head_dim}"
    if case.dtype not in ("bf16", "fp16") or case.cache_dtype not in (case.dtype, "fp8_e4m3fn"):
        wanted = "bf16 or fp16 queries with a cache of that dtype or an fp8_e4m3fn one"
        return f"{name} takes {wanted}, got {case.dtype} with {case.cache_dtype}"
    if case.gqa > most or case.gqa & (case.gqa - 1):
        return f"{name} needs a power of two up to {most} as query heads for each KV head, got {case.gqa}"
    if case.scales == "token":
        return f"{name} takes one k_scale and one v_scale, not one for each token"
    return compact(name, case)
