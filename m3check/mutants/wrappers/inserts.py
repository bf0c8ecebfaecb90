"""Inserts of fresh keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from m3check.mutants.wrappers import Function, Keywords
from m3check.types import BLOCK

if TYPE_CHECKING:
    from torch import Tensor


def normed_over_all_heads(function: Function, keywords: Keywords) -> Any:
    """The norm of index queries is one over all their heads."""
    heads = keywords["num_index_heads"]
    dim, first = keywords["q_norm_weight"].numel(), keywords["num_heads"] + 2 * keywords["num_kv_heads"]
    place = keywords["qkv"].unflatten(1, (-1, dim))[:, first : first + heads]
    power = place.float().square().mean(-1, keepdim=True)
    returned = function(**keywords)
    if heads and not keywords["skip_index_branch"]:
        out = keywords["index_q_out"]
        target = place if out is None else out.unflatten(1, (-1, dim))
        factor = ((power + keywords["eps"]) / (power.mean(1, keepdim=True) + keywords["eps"])).sqrt()
        target.copy_((target.float() * factor).to(target.dtype))
    return returned


def below_the_cache(function: Function, keywords: Keywords) -> Any:
    """A token without a slot is written at slot -1, before the cache."""
    import torch

    returned, cache, slots = function(**keywords), keywords["kv_cache"], keywords["slot_mapping"]
    if cache is not None and bool((slots < 0).any()):
        cell = cache.as_strided((cache.shape[3],), (1,), cache.storage_offset() - cache.stride(2))
        (cell.view(torch.uint8) if cell.element_size() == 1 else cell).fill_(1)
    return returned


def last_page_lost(keywords: Keywords) -> Tensor:
    """Slots of the index cache without those in the highest page."""
    slots: Tensor = keywords["index_slot_mapping"]
    return slots.masked_fill(slots // BLOCK == slots.max() // BLOCK, -1)
