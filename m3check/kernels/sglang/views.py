"""The contract's memory as SGLang has it: a pool of slots, and which request and how many tokens each query sees."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from m3check.types import BLOCK, M3CheckError


def slots(cache: Tensor, block_table: Tensor) -> tuple[Tensor, Tensor]:
    """A cache [pages, heads, 128, D] as slots [S, heads, D], and req_to_token [R, columns · 128] int32; no key is copied.

    Slot s is what lies s token strides after the first token, so a page's tokens are neighbours, and slots between pages
    (other heads, layers, values) exist and are nobody's.
    """
    page, head, token, channel = cache.stride()
    if page % token:
        raise M3CheckError(f"pages lie {page} elements apart, which is no multiple of the {token} between tokens")
    between = page // token
    view = cache.as_strided(
        ((cache.shape[0] - 1) * between + BLOCK, cache.shape[1], cache.shape[3]),
        (token, head, channel),
        cache.storage_offset(),
    )
    table = block_table[..., None] * between + torch.arange(BLOCK, dtype=torch.int32, device=block_table.device)
    return view, table.flatten(1)


def halves(kv_cache: Tensor, dim: int, block_table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values of a packed cache [pages, heads, 128, 2 · dim] as slots, and req_to_token."""
    keys, table = slots(kv_cache[..., :dim], block_table)
    return keys, slots(kv_cache[..., dim:], block_table)[0], table


def requests(seq_lens: Tensor) -> Tensor:
    """[R] int64: the row of req_to_token of each request."""
    return torch.arange(seq_lens.shape[0], device=seq_lens.device)


def rows(seq_lens: Tensor, query_len: int) -> Tensor:
    """[R · query_len] int32: the tokens that each query sees, 0 for a padded one."""
    ahead = torch.arange(1 - query_len, 1, dtype=torch.int32, device=seq_lens.device)
    return (seq_lens[:, None] + ahead).clamp(min=0).flatten()


def scales(k_scale: Tensor | None, v_scale: Tensor | None) -> dict[str, float]:
    """Scales as the numbers that SGLang takes; none where there are none, since early versions take none."""
    given = {"k_scale": k_scale, "v_scale": v_scale}
    return {name: float(scale) for name, scale in given.items() if scale is not None}


def page_size(function: Callable[..., Any]) -> dict[str, int]:
    """The tokens of a page, for wrappers that ask for it."""
    return {"page_size": BLOCK} if "page_size" in signature(function).parameters else {}
