"""Decode block scores and their selection.

    ids[h, t] = index_topk of the plain scores of index_decode_score

Forcing ranks blocks by where they stand, so it makes no difference that the decode scores hold it already. A dead row
has only -1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from m3check.reference.index_decode_score import index_decode_score
from m3check.reference.index_topk import index_topk
from m3check.types import Request


def index_decode(
    idx_q: Tensor,
    idx_k: Tensor,
    requests: Sequence[Request],
    topk: int,
    init_blocks: int,
    local_blocks: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [H, T, topk] int32, then score and plain score [H, T, K] as of `index_decode_score`)."""
    score, plain = index_decode_score(idx_q, idx_k, requests, init_blocks, local_blocks, dtype)
    return index_topk(plain, requests, topk, init_blocks, local_blocks), score, plain
