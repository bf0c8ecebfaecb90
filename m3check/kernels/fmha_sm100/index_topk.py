"""`index_topk` by sparse_topk_select on token-major scores, each row bounded by the blocks that it sees."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from m3check.kernels.fmha_sm100.index_score import TILES, room, unified
from m3check.kernels.fmha_sm100.interface import Interface
from m3check.types import BLOCK, Case

if TYPE_CHECKING:
    from torch import Tensor

NAME = "sparse_topk_select"

SLOTS = 16
"""The only length of an id list that the kernel has."""


def adapter(interface: Interface) -> Any:
    """The op's function."""

    def index_topk(
        score: Tensor,
        cu_seqlens_q: Tensor,
        prefix_lens: Tensor,
        topk: int,
        init_blocks: int,
        local_blocks: int,
        out: Tensor | None = None,
    ) -> Tensor:
        import torch

        rows = score.shape[1]
        query_lens = cu_seqlens_q[1:] - cu_seqlens_q[:-1]
        first = (prefix_lens - cu_seqlens_q[:-1]).repeat_interleave(query_lens, output_size=rows)
        position = first + torch.arange(rows, device=score.device, dtype=torch.int32)
        return select(interface, in_production(score, position), position, topk, init_blocks, local_blocks, out)

    return index_topk


def in_production(score: Tensor, position: Tensor) -> Tensor:
    """Scores [H, T, K] in production's buffer [T, H, TILES]: -inf where a row sees no block, which MSA asks of its caller.

    A narrower buffer would take another path: up to 16 tiles are written down without being compared. What OnlyScore
    wrote is in such a buffer and stays as it is.
    """
    import torch

    by_token = score.transpose(0, 1)
    if score.shape[2] == TILES and by_token.is_contiguous():
        return by_token
    wide = unified(by_token)
    tile = torch.arange(score.shape[2], device=score.device)
    seen = tile < valid_pages(position)[:, None, None]
    wide[..., : score.shape[2]] = by_token.where(seen, float("-inf"))
    return wide


def valid_pages(position: Tensor) -> Tensor:
    """Blocks that a query at each position sees, int32; one for a padded row, whose position is below 0.

    Such a row has no position; the batch's holds something that is not negative, and so do ours.
    """
    import torch

    return (position.clamp(min=0) // BLOCK + 1).to(torch.int32)


def select(
    interface: Interface,
    scores: Tensor,
    position: Tensor,
    topk: int,
    init_blocks: int,
    local_blocks: int,
    out: Tensor | None,
) -> Tensor:
    """Ids [H, T, topk] of scores [T, H, K] (contiguous); `position` [T] is each query's token position."""
    assert interface.select is not None
    import torch

    rows, heads, _ = scores.shape
    if out is None:
        out = torch.empty(rows, heads, topk, dtype=torch.int32, device=scores.device).transpose(0, 1)
    if rows:
        interface.select(
            scores,
            topk,
            num_valid_pages=valid_pages(position),
            force_begin_blocks=init_blocks,
            force_end_blocks=local_blocks,
            output=out[:, :rows].transpose(0, 1),
            max_score_layout="THK",
        )
    return out[:, :rows]


def refusal(case: Case) -> str | None:
    """Why sparse_topk_select cannot run a case."""
    if case.topk != SLOTS:
        return f"{NAME} needs topk 16, got {case.topk}"
    if case.init_blocks + case.local_blocks > SLOTS:
        return f"{NAME} forces at most 16 blocks, got {case.init_blocks} + {case.local_blocks}"
    return room(NAME, case)
