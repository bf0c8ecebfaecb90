"""Causal softmax attention over the listed blocks, for the last query_len tokens of each request.

The formula of `sparse_attn`, word for word: a decode batch differs only in that all requests have the same query_len, and
that a request may have fewer tokens than queries (none, in a padded batch). Its first rows then stand at negative
positions, see no token, and have out = 0 and lse = -inf.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from m3check.reference.sparse_attn import sparse_attn
from m3check.types import Request


def sparse_attn_decode(
    q: Tensor, k: Tensor, v: Tensor, topk_idx: Tensor, requests: Sequence[Request], sm_scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(out [T, Hq, D], lse [T, Hq]), as of `sparse_attn`."""
    return sparse_attn(q, k, v, topk_idx, requests, sm_scale, dtype)
