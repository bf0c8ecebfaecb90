"""From logical tokens to a provider's physical memory: cache layouts, block tables, poison, canaries.

A kernel never sees logical tensors and a reference never sees a page table; this package is the only bridge. Every byte
that no live token owns holds poison, pages are shuffled, and what a kernel may write stands inside a larger buffer whose
other cells are watched.
"""

from m3check.paging.caches import pack_index_cache, pack_main_cache, pack_scale
from m3check.paging.pages import POOL_LAYERS, SPARE_PAGES, TABLE_MARGIN, Pages, far_page, poisoned_pages, watched_pages
from m3check.paging.run import Run, Served, World
from m3check.paging.tensors import (
    GARBAGE,
    IMPOSSIBLE_ID,
    Poison,
    apart,
    filled,
    lengths,
    oddly_strided,
    poison_value,
    stored,
    torch_dtype,
    with_far_rows,
    words,
)
from m3check.paging.watched import MARGIN, SPARE_ROWS, Access, Frozen, Guard, Misuse, Observation, Territory, guarded

__all__ = [
    "GARBAGE",
    "IMPOSSIBLE_ID",
    "MARGIN",
    "POOL_LAYERS",
    "SPARE_PAGES",
    "SPARE_ROWS",
    "TABLE_MARGIN",
    "Access",
    "Frozen",
    "Guard",
    "Misuse",
    "Observation",
    "Pages",
    "Poison",
    "Run",
    "Served",
    "Territory",
    "World",
    "apart",
    "far_page",
    "filled",
    "guarded",
    "lengths",
    "oddly_strided",
    "pack_index_cache",
    "pack_main_cache",
    "pack_scale",
    "poison_value",
    "poisoned_pages",
    "stored",
    "torch_dtype",
    "watched_pages",
    "with_far_rows",
    "words",
]
