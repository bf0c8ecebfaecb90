"""Caches and block tables, of scoring and attention alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from m3check.mutants.wrappers import Keywords

if TYPE_CHECKING:
    from torch import Tensor


def first_layer(name: str) -> Callable[[Keywords], Tensor]:
    """The cache of layer 0 of a pool instead of the layer's own."""

    def change(keywords: Keywords) -> Tensor:
        cache: Tensor = keywords[name]
        return cache.as_strided(cache.shape, cache.stride(), 0)

    return change


def repeated_pages(keywords: Keywords) -> Tensor:
    """The page is looked up for every second block only."""
    table: Tensor = keywords["block_table"].clone()
    table[:, 1::2] = table[:, ::2][:, : table[:, 1::2].shape[1]]
    return table


def identity_table(keywords: Keywords) -> Tensor:
    """Page n holds block n, whatever the table says."""
    import torch

    table: Tensor = keywords["block_table"]
    cache: Tensor = keywords["kv_cache"] if "kv_cache" in keywords else keywords["index_kv_cache"]
    pages = torch.arange(table.numel(), dtype=table.dtype, device=table.device) % cache.shape[0]
    return pages.view(table.shape)


def dense_cache(keywords: Keywords) -> Tensor:
    """A cache read as if its pages were dense."""
    cache: Tensor = keywords["kv_cache"]
    strides: list[int] = []
    step = 1
    for size in reversed(cache.shape):
        strides.insert(0, step)
        step *= size
    return cache.as_strided(cache.shape, strides, cache.storage_offset())


def as_fnuz(name: str) -> Callable[[Keywords], Tensor]:
    """e4m3fn codes read as e4m3fnuz."""

    def change(keywords: Keywords) -> Tensor:
        import torch

        cache: Tensor = keywords[name]
        return cache.view(torch.float8_e4m3fnuz) if cache.dtype == torch.float8_e4m3fn else cache

    return change


def as_numbers(name: str, queries: str) -> Callable[[Keywords], Tensor]:
    """fp8 codes taken as the integers 0 … 255."""

    def change(keywords: Keywords) -> Tensor:
        import torch

        cache: Tensor = keywords[name]
        if cache.element_size() > 1:
            return cache
        like = keywords[queries].dtype
        return cache.view(torch.uint8).to(like if like.itemsize > 1 else torch.bfloat16)

    return change
