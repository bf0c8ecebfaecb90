"""Scores and what they are computed of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from m3check.mutants.wrappers import Function, Keywords
from m3check.types import BLOCK

if TYPE_CHECKING:
    from torch import Tensor


def narrow_scores(function: Function, keywords: Keywords) -> Tensor:
    """The score row is sized by a stale host length of 64 tokens; the rest of the row is what memory held."""
    import torch

    whole = function(**keywords)
    narrow = function(**{**keywords, "max_seq_len": 64})
    stale = torch.full_like(whole, float("nan"))
    columns = min(1, narrow.shape[2])
    stale[..., :columns] = narrow[..., :columns]
    return stale


def shared_over_heads(result: Tensor, keywords: Keywords) -> None:
    """One selection for all index heads: the largest score of any head, or the first head's ids."""
    if result.is_floating_point():
        result.copy_(result.amax(0, keepdim=True).expand_as(result).clone())
    else:
        result.copy_(result[:1].expand_as(result).clone())


def rounded_twice(keywords: Keywords) -> Tensor:
    """Index queries that went through fp8 on their way."""
    import torch

    q: Tensor = keywords["idx_q"]
    return q if q.element_size() == 1 else q.to(torch.float8_e4m3fn).to(q.dtype)


def chunk_start_forgotten(keywords: Keywords) -> Tensor:
    """The keys of a chunk's first block that an earlier chunk wrote: lost from the maximum (NaN is ignored by it)."""
    cache: Tensor = keywords["index_kv_cache"].clone()
    raw, code = _raw(cache)
    for request, prefix in enumerate(keywords["prefix_lens"].tolist()):
        if prefix % BLOCK:
            page = int(keywords["block_table"][request, prefix // BLOCK])
            raw[page, : prefix % BLOCK] = code
    return cache


def _raw(cache: Tensor) -> tuple[Tensor, Any]:
    """A cache through which NaN can be written, and the NaN."""
    import torch

    if cache.element_size() > 1:
        return cache, float("nan")
    code = 0x80 if "fnuz" in str(cache.dtype) else 0x7F
    return cache.view(torch.uint8), code
