"""Logical keys, values and scales in a provider's cache layout; every byte that no live token owns holds poison."""

from __future__ import annotations

from torch import Tensor

from m3check import arena
from m3check.paging.pages import POOL_LAYERS, Pages, poisoned_pages
from m3check.paging.tensors import Poison, assignable, filled, poison_value, words
from m3check.types import BLOCK, Case, Inputs


def pack_index_cache(inputs: Inputs, pages: Pages, poison: Poison) -> Tensor:
    """Index keys [N, D] as the index cache [page, 128, D], poison wherever no token lives, in every second slot negated."""
    keys = inputs.idx_k
    assert keys is not None
    layers = POOL_LAYERS if inputs.case.layout == "pool" else 1
    storage = poisoned_pages([layers, BLOCK, keys.shape[-1]], pages, poison, keys)
    cache = storage[:, layers // 2]
    if poison == "garbage":  # of both signs, since a query may hide one of them from a maximum
        words(cache)[pages.first :, 1::2] ^= {1: 0x80, 2: -0x8000, 4: -0x80000000}[cache.element_size()]
    slots = pages.slots(inputs.case)
    assignable(cache)[slots // BLOCK, slots % BLOCK] = assignable(keys)
    return cache


def pack_main_cache(inputs: Inputs, pages: Pages, kv_layout: str, poison: Poison) -> Tensor:
    """Keys and values [N, Hkv, D] as the main cache, in the provider's layout and the case's memory order.

    `packed` gives [page, Hkv, 128, 2D] with keys in the first D channels; `split` gives [page, 2, 128, Hkv, D].
    """
    k, v, case = inputs.k, inputs.v, inputs.case
    assert k is not None
    assert v is not None
    heads, dim = k.shape[1:]
    layers = POOL_LAYERS if case.layout == "pool" else 1
    if kv_layout == "packed":
        # logical view: page, head, token, channel
        order: tuple[int, ...] = (0, 1, 3, 2, 4) if case.layout == "nhd" else (0, 1, 2, 3, 4)
        shape = [pages.count, layers, heads, BLOCK, 2 * dim]
    else:
        # logical view: page, k or v, token, head, channel
        order = (0, 1, 2, 3, 4, 5) if case.layout == "nhd" else (0, 1, 2, 4, 3, 5)
        shape = [pages.count, layers, 2, BLOCK, heads, dim]
    storage = poisoned_pages([shape[axis] for axis in order[1:]], pages, poison, k)
    cache = storage.permute(*(order.index(axis) for axis in range(len(order))))[:, layers // 2]
    slots = pages.slots(case)
    page, offset, raw = slots // BLOCK, slots % BLOCK, assignable(cache)
    if kv_layout == "packed":
        raw[page, :, offset, :dim] = assignable(k)
        raw[page, :, offset, dim:] = assignable(v)
    else:
        raw[page, 0, offset] = assignable(k)
        raw[page, 1, offset] = assignable(v)
    return cache


def pack_scale(scale: Tensor | None, case: Case, pages: Pages, poison: Poison) -> Tensor | None:
    """A scale as kernels take it: one element, or [Hkv, pages · 128] by physical slot; poison where no token lives."""
    if scale is None:
        return None
    if scale.dim() == 0:
        return scale.reshape(1).clone()
    packed = _slots(scale.shape[1], pages, poison, scale)
    packed[:, pages.slots(case)] = scale.T
    return packed


def _slots(heads: int, pages: Pages, poison: Poison, like: Tensor) -> Tensor:
    """Poisoned storage [heads, slots] of scales."""
    value = poison_value(like.dtype, poison)
    if not pages.first:
        return filled([heads, pages.count * BLOCK], value, like.dtype, like.device)
    count = (pages.first + pages.count) * BLOCK
    storage = arena.allocate(heads * count, like.dtype, like.device).view(heads, count)
    storage[:, pages.first * BLOCK :] = value
    return storage
