"""Selected ids."""

from __future__ import annotations

from typing import TYPE_CHECKING

from m3check.mutants.wrappers import Function, Keywords

if TYPE_CHECKING:
    from torch import Tensor


def few_ties(result: Tensor, keywords: Keywords) -> None:
    """A tie buffer of two: more blocks that tie with the last one taken are dropped, and the row is filled up with -1."""
    import torch

    score: Tensor | None = keywords.get("score", keywords.get("score_out"))
    if score is None:
        return
    ids = result[:, : score.shape[1]]
    at = score[:, : ids.shape[1]].gather(2, ids.clamp(min=0, max=score.shape[2] - 1).long())
    used = ids >= 0
    least = torch.where(used, at, float("inf")).amin(2, keepdim=True)
    tied = used & (at == least)
    dropped = tied & (tied.cumsum(2) > 2)
    kept = torch.where(dropped, -1, ids)
    order = (kept < 0).to(torch.int8).argsort(dim=2, stable=True)
    ids.copy_(kept.gather(2, order))


def garbage_fills(result: Tensor, keywords: Keywords) -> None:
    """Unused slots hold the next ids instead of -1: k was not clamped to the number of blocks."""
    import torch

    slots = torch.arange(result.shape[-1], dtype=result.dtype, device=result.device).expand_as(result)
    result.copy_(torch.where(result < 0, slots, result))


def cut_after_sort(function: Function, keywords: Keywords) -> Tensor:
    """The power of two above topk is selected, sorted by id, and cut."""
    import torch

    topk, out = keywords["topk"], keywords.get("out")
    result = function(**{**keywords, "topk": 1 << (topk - 1).bit_length(), "out": None})
    ordered = torch.where(result < 0, 1 << 30, result).sort(2).values[..., :topk]
    ids = torch.where(ordered == 1 << 30, -1, ordered).to(torch.int32)
    if out is None:
        return ids
    out[:, : ids.shape[1]] = ids
    return out  # type: ignore[no-any-return]


def stale_slots(result: Tensor, keywords: Keywords) -> None:
    """The state of the row before survives in a short row."""
    import torch

    for row in range(1, result.shape[1]):
        result[:, row] = torch.where(result[:, row] < 0, result[:, row - 1], result[:, row])


def padding_over_rows(result: Tensor, keywords: Keywords) -> None:
    """Rows of padding are written over the batch's first row."""
    result[:, :1] = -1


def padding_past_rows(result: Tensor, keywords: Keywords) -> None:
    """One row of padding more than there are rows."""
    tokens = keywords["idx_q"].shape[0] if "idx_q" in keywords else keywords["score"].shape[1]
    offset = result.storage_offset() + (result.shape[0] - 1) * result.stride(0) + tokens * result.stride(1)
    result.as_strided((result.shape[2],), (result.stride(2),), offset).fill_(-1)


def hole_first(result: Tensor, keywords: Keywords) -> None:
    """-1 is emitted early in rows that have one."""
    import torch

    short = (result < 0).any(2, keepdim=True) & (result >= 0).any(2, keepdim=True)
    result.copy_(torch.where(short, result.roll(1, 2), result))
