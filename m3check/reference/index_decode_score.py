"""Block scores of a decode batch, with the forced blocks already in them.

    score[h, t, b] = LOCAL_SCORE   where b is one of the last local_blocks visible blocks
                     INIT_SCORE    where b < init_blocks, visible and not local
                     max of idx_q[t, h] · idx_k[n] over the visible tokens of b, elsewhere; -inf without a visible token

The queries are the last query_len tokens of each request. A request with fewer tokens than queries starts with dead rows,
which see nothing and are -inf throughout. Scores are fp32 cells, so a forced one holds what fp32 makes of its constant.
The plain scores, before forcing, are those of `index_score`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from m3check.reference.index_score import index_score
from m3check.reference.rows import forced_blocks, positions
from m3check.types import INIT_SCORE, LOCAL_SCORE, Request


def index_decode_score(
    idx_q: Tensor, idx_k: Tensor, requests: Sequence[Request], init_blocks: int, local_blocks: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(score, plain score), each [H, T, K] in `dtype`, from idx_q [T, H, D] and idx_k [N, D]."""
    plain = index_score(idx_q, idx_k, requests, dtype)
    init, local = forced_blocks(positions(requests, plain.device), plain.shape[-1], init_blocks, local_blocks)
    forced = torch.tensor([INIT_SCORE, LOCAL_SCORE], dtype=torch.float32).tolist()
    return plain.masked_fill(init, forced[0]).masked_fill(local, forced[1]), plain
