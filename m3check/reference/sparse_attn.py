"""Causal softmax attention over the listed blocks.

    S(h, t) = the tokens n <= position(t) of the blocks topk_idx[h, t]
    out[t, hq] = Σ w_n v[n, h],  w = softmax of sm_scale · q[t, hq] · k[n, h] over n in S(h, t),  h = hq // G
    lse[t, hq] = log2 Σ exp(sm_scale · q[t, hq] · k[n, h])

Query i of a request stands at position kv_len - query_len + i. An id that is negative (-1 is an unused slot) or names a
block that the query does not see contributes nothing, wherever it stands in the list. A row without any token has
out = 0 and lse = -inf. An id listed twice is outside the contract.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from m3check.reference.rows import chunks, full_precision, positions
from m3check.types import BLOCK, Request


@full_precision()
def sparse_attn(
    q: Tensor, k: Tensor, v: Tensor, topk_idx: Tensor, requests: Sequence[Request], sm_scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(out [T, Hq, D], lse [T, Hq]) in `dtype`, from q [T, Hq, D], k and v [N, Hkv, D], topk_idx [Hkv, T, topk]."""
    queries, heads, dims = q.shape
    kv_heads, _, topk = topk_idx.shape
    out = torch.zeros((queries, heads, dims), dtype=dtype, device=q.device)
    lse = torch.full((queries, heads), -torch.inf, dtype=dtype, device=q.device)
    if len(k) == 0:
        return out, lse
    position = positions(requests, q.device)  # [T]
    first_token = _first_tokens(requests, q.device)  # [T]
    head = torch.arange(kv_heads, device=q.device)[:, None, None]
    for rows in chunks(queries, kv_heads * topk * BLOCK * dims * dtype.itemsize):
        token = _tokens(topk_idx[:, rows])  # [Hkv, c, S], positions in the request
        attended = (token >= 0) & (token <= position[rows, None])
        # Tokens that are not attended are read as token 0, then masked.
        logical = (first_token[rows, None] + token).where(attended, 0)
        keys = _gather(k, logical, head, dtype)  # [Hkv, c, S, D]
        values = _gather(v, logical, head, dtype).masked_fill_(~attended[..., None], 0)
        grouped = q[rows].to(dtype).reshape(-1, kv_heads, heads // kv_heads, dims).transpose(0, 1)  # [Hkv, c, G, D]
        logits = (grouped @ keys.mT * sm_scale).masked_fill_(~attended[:, :, None], -torch.inf)  # [Hkv, c, G, S]
        largest = logits.amax(-1, keepdim=True)
        largest = largest.masked_fill(largest == -torch.inf, 0)  # a row without any token: weights of exp(-inf) = 0
        weights = (logits - largest).exp_()
        total = weights.sum(-1, keepdim=True)
        attention = weights @ values / total.masked_fill(total == 0, 1)  # [Hkv, c, G, D]
        out[rows] = attention.transpose(0, 1).flatten(1, 2)
        lse[rows] = (largest / math.log(2) + total.log2()).squeeze(-1).transpose(0, 1).flatten(1, 2)
    return out, lse


def _tokens(ids: Tensor) -> Tensor:
    """The positions [..., topk * 128] of all tokens of blocks [..., topk]; negative for a negative id."""
    return (ids.long()[..., None] * BLOCK + torch.arange(BLOCK, device=ids.device)).flatten(-2)


def _first_tokens(requests: Sequence[Request], device: torch.device) -> Tensor:
    """Where the tokens of each query's request start among the N logical tokens, int64 [T]."""
    starts = [torch.full((request.query_len,), request.kv_start) for request in requests]
    return torch.cat([torch.zeros(0, dtype=torch.int64), *starts]).to(device)


def _gather(cache: Tensor, token: Tensor, head: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows [Hkv, c, S, D] of a cache [N, Hkv, D] in `dtype`: those of each head's own tokens."""
    row = token * cache.shape[1] + head
    return cache.flatten(0, 1).index_select(0, row.flatten()).to(dtype).reshape(*row.shape, -1)
