"""Logits of a lightning indexer whose heads share fp8 keys: one number for each query and token, which a top-k then ranks.

    logits[t, n] = Σ_h weights[t, h] · max(0, scale[n] · idx_q[t, h] · idx_k[n])    for tokens n <= position(t)
    logits[t, n] = -inf                                                              for all others

Tokens are counted within the row's own request; `mqa_logits` and `paged_mqa_logits` differ only in where kernels find them.
A dead row (no visible token) is -inf throughout.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from m3check.reference.rows import chunks, full_precision, positions
from m3check.types import Request


@full_precision()
def mqa_logits(
    idx_q: Tensor, idx_k: Tensor, key_scale: Tensor, weights: Tensor, requests: Sequence[Request], dtype: torch.dtype
) -> Tensor:
    """[T, longest visible length] in `dtype`, from idx_q [T, H, D], idx_k [N, D], key_scale [N], weights [T, H]."""
    longest = max((request.kv_len for request in requests), default=0)
    logits = torch.full((len(idx_q), longest), -torch.inf, dtype=dtype, device=idx_q.device)
    position = positions(requests, idx_q.device)
    for request in requests:
        keys, scale = idx_k[request.tokens].to(dtype), key_scale[request.tokens].to(dtype)
        token = torch.arange(request.kv_len, device=idx_q.device)
        for part in chunks(request.query_len, idx_q.shape[1] * request.kv_len * dtype.itemsize):
            rows = slice(request.query_start + part.start, request.query_start + part.stop)
            products = (idx_q[rows].to(dtype) @ keys.T * scale).clamp(min=0)  # [c, H, n]
            weighed = (weights[rows].to(dtype)[..., None] * products).sum(1)
            logits[rows, : request.kv_len] = weighed.masked_fill(token > position[rows, None], -torch.inf)
    return logits
