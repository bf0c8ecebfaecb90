"""Sparse multi-head latent attention: softmax attention over a list of tokens, on one latent vector for each token.

    S(t) = the tokens of row t's list, -1 left out wherever it stands
    out[t, h] = Σ w_n k[n, :512],  w = softmax of sm_scale · q[t, h] · k[n] over n in S(t)
    lse[t, h] = log2 Σ exp(sm_scale · q[t, h] · k[n])

A latent key has 576 channels: 512 that are its value as well, then 64 of rotary position. The list alone decides what is
attended to: it names positions in the row's own request, and whoever made it has seen to causality. A row whose list names
no token has out = 0 and lse = -inf.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from m3check.reference.rows import chunks, full_precision
from m3check.types import ROPE, Request


@full_precision()
def mla_sparse(
    q: Tensor, k: Tensor, topk_idx: Tensor, requests: Sequence[Request], sm_scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(out [T, Hq, D - 64], lse [T, Hq]) in `dtype`, from q [T, Hq, D], k [N, 1, D] and topk_idx [1, T, topk]."""
    queries, heads, dims = q.shape
    out = torch.zeros((queries, heads, dims - ROPE), dtype=dtype, device=q.device)
    lse = torch.full((queries, heads), -torch.inf, dtype=dtype, device=q.device)
    for request in requests:
        for part in chunks(request.query_len, topk_idx.shape[-1] * (2 * dims + 2 * heads) * dtype.itemsize):
            rows = slice(request.query_start + part.start, request.query_start + part.stop)
            token = topk_idx[0, rows].long()  # [c, topk]
            listed = token >= 0
            keys = k[request.tokens, 0][token.clamp(min=0)].to(dtype)  # [c, topk, D]
            keys = keys.masked_fill(~listed[..., None], 0)
            logits = (q[rows].to(dtype) @ keys.mT * sm_scale).masked_fill(~listed[:, None], -torch.inf)  # [c, Hq, topk]
            largest = logits.amax(-1, keepdim=True)
            largest = largest.masked_fill(largest == -torch.inf, 0)  # a row without any token: weights of exp(-inf) = 0
            weights = (logits - largest).exp()
            total = weights.sum(-1, keepdim=True)
            out[rows] = weights @ keys[..., : dims - ROPE] / total.masked_fill(total == 0, 1)
            lse[rows] = (largest / math.log(2) + total.log2()).squeeze(-1)
    return out, lse
