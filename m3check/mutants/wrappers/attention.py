"""Attention: its lists, its scales, its dead rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from m3check.mutants.wrappers import Function, Keywords, given

if TYPE_CHECKING:
    from torch import Tensor


def token_major_ids(keywords: Keywords) -> Tensor:
    """Head-major ids read as token-major ones."""
    ids: Tensor = keywords["topk_idx"]
    heads, tokens, topk = ids.shape
    return ids.contiguous().view(tokens, heads, topk).transpose(0, 1)


def baked_scale() -> Callable[[Function, Keywords], Any]:
    """sm_scale of the first call is used by all later ones."""
    first: list[float] = []

    def change(keywords: Keywords) -> float:
        first.append(keywords["sm_scale"])
        return first[0]

    return given(sm_scale=change)


def mean_scale(name: str) -> Callable[[Keywords], Tensor]:
    """One scale for all tokens where each has its own."""

    def change(keywords: Keywords) -> Tensor:
        scale: Tensor = keywords[name]
        return scale if scale.dim() < 2 else scale.nanmean().expand_as(scale).contiguous()

    return change


def dead_rows_nan(result: Tensor, keywords: Keywords) -> None:
    """Rows that see no block become NaN, as 0/0 of a merge without a guard."""
    import torch

    query_len = keywords.get("decode_query_len", 0)
    lengths = keywords["seq_lens"].repeat_interleave(query_len)
    row = torch.arange(lengths.shape[0], device=lengths.device) % query_len
    result[lengths - query_len + row < 0] = float("nan")
