"""Which blocks a query attends to.

    ids[h, t] = the min(topk, visible) best visible blocks of score[h, t], best first, then -1

Best are the init blocks (b < init_blocks), then the local ones (the last local_blocks visible, the query's own included),
then the others by descending score; NaN ranks below -inf, -0 equals +0, and equals go to the smaller id. A block that is
both init and local counts as local. Where init + local > topk the init blocks come first, so the query's own block may be
left out. What makes a block forced is where it stands, not its score, so no score is too large for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from m3check.reference.rows import chunks, forced_blocks, positions, visible_blocks
from m3check.types import Request

SORT_BYTES = 64
"""What the two stable sorts keep for each cell, with their int64 indices."""


def index_topk(score: Tensor, requests: Sequence[Request], topk: int, init_blocks: int, local_blocks: int) -> Tensor:
    """Ids [H, T, topk] int32 from scores [H, T, K] of any float dtype; cells of invisible blocks are not read."""
    heads, queries, columns = score.shape
    position = positions(requests, score.device)
    ids = torch.full((heads, queries, topk), -1, dtype=torch.int32, device=score.device)
    width = min(topk, columns)
    for rows in chunks(queries, heads * columns * SORT_BYTES):
        best = _best_first(score[:, rows], position[rows], init_blocks, local_blocks)[..., :width]
        used = torch.arange(width, device=score.device) < visible_blocks(position[rows])[:, None]
        ids[:, rows, :width] = best.where(used, -1).int()
    return ids


def _best_first(score: Tensor, position: Tensor, init_blocks: int, local_blocks: int) -> Tensor:
    """All block ids of each row, best first: stable sorts, the least significant key first."""
    columns = score.shape[-1]
    init, local = forced_blocks(position, columns, init_blocks, local_blocks)
    visible = torch.arange(columns, device=score.device) < visible_blocks(position)[:, None]
    rank = torch.where(score.isnan(), -2, -1).masked_fill(init, 2).masked_fill(local, 1).masked_fill(~visible, -3)
    plain = score.masked_fill(rank != -1, 0) + 0.0  # -0 + 0 is +0
    by_score = plain.sort(dim=-1, descending=True, stable=True).indices
    by_rank = rank.gather(-1, by_score).sort(dim=-1, descending=True, stable=True).indices
    return by_score.gather(-1, by_rank)
