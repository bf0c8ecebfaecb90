"""Block scores of a prefill batch.

    score[h, t, b] = max of idx_q[t, h] · idx_k[n] over the visible tokens n of block b

Query i of a request stands at position kv_len - query_len + i and sees the tokens 0 … position. The dot is raw: no scale,
no softmax. A block without a visible token scores -inf. A NaN dot is ignored by the maximum, unless all visible dots of
the block are NaN: then the score is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from m3check.reference.rows import chunks, full_precision
from m3check.types import BLOCK, Request, blocks


@full_precision()
def index_score(idx_q: Tensor, idx_k: Tensor, requests: Sequence[Request], dtype: torch.dtype) -> Tensor:
    """Scores [H, T, K] in `dtype` from idx_q [T, H, D] and idx_k [N, D]; K is the blocks of the longest request."""
    queries, heads, _ = idx_q.shape
    columns = blocks(max((request.kv_len for request in requests), default=0))
    score = torch.full((heads, queries, columns), -torch.inf, dtype=dtype, device=idx_q.device)
    for request in requests:
        q = idx_q[request.queries]  # [query_len, H, D]
        k = _whole_blocks(idx_k[request.tokens].to(dtype))  # [nb * 128, D]
        for rows in chunks(request.query_len, heads * len(k) * dtype.itemsize):
            seen = blocks(request.position(rows.stop - 1) + 1)  # blocks that the last of these rows sees
            maxima = _block_maxima(q[rows].to(dtype), k[: seen * BLOCK], request.position(rows.start))
            score[:, request.queries, :seen][:, rows] = maxima
    return score


def _block_maxima(q: Tensor, k: Tensor, first_position: int) -> Tensor:
    """Scores [H, c, nb] of c queries [c, H, D], the first at `first_position`, over keys [nb * 128, D]."""
    position = torch.arange(first_position, first_position + len(q), device=q.device)[:, None]  # [c, 1]
    token = torch.arange(len(k), device=q.device)
    dots = (q.transpose(0, 1) @ k.T).masked_fill_(token > position, torch.nan)  # [H, c, nb * 128]
    maxima = dots.reshape(*dots.shape[:2], -1, BLOCK)  # [H, c, nb, 128]
    while (width := maxima.shape[-1]) > 1:  # fmax ignores NaN: invisible keys and NaN dots alike
        maxima = torch.fmax(maxima[..., : width // 2], maxima[..., width // 2 :])
    return maxima.squeeze(-1).masked_fill_(token[::BLOCK] > position, -torch.inf)


def _whole_blocks(k: Tensor) -> Tensor:
    """Keys padded to whole blocks; the padding stands after every query, where nobody sees it."""
    return torch.nn.functional.pad(k, (0, 0, 0, -len(k) % BLOCK))
