"""The chains, from queries and keys to the attention output: score → select → attend, each stage on the one before.

The selection is the reference's own, so a chain shows what a whole layer must give. Where two scores are closer than
rounding, a kernel may rightly select otherwise; its attention is then judged on its own ids, not on these.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from m3check.reference.index_decode import index_decode
from m3check.reference.index_score import index_score
from m3check.reference.index_topk import index_topk
from m3check.reference.sparse_attn import sparse_attn
from m3check.reference.sparse_attn_decode import sparse_attn_decode
from m3check.types import Request


def prefill(
    idx_q: Tensor,
    idx_k: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    requests: Sequence[Request],
    topk: int,
    init_blocks: int,
    local_blocks: int,
    sm_scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """(score [H, T, K], ids [H, T, topk] int32, out [T, Hq, D], lse [T, Hq]), all but ids in `dtype`."""
    score = index_score(idx_q, idx_k, requests, dtype)
    ids = index_topk(score, requests, topk, init_blocks, local_blocks)
    out, lse = sparse_attn(q, k, v, ids, requests, sm_scale, dtype)
    return score, ids, out, lse


def decode(
    idx_q: Tensor,
    idx_k: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    requests: Sequence[Request],
    topk: int,
    init_blocks: int,
    local_blocks: int,
    sm_scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """(score and plain score [H, T, K], ids, out, lse) of `index_decode` and `sparse_attn_decode`, else as of `prefill`."""
    ids, score, plain = index_decode(idx_q, idx_k, requests, topk, init_blocks, local_blocks, dtype)
    out, lse = sparse_attn_decode(q, k, v, ids, requests, sm_scale, dtype)
    return score, plain, ids, out, lse
