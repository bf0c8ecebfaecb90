"""Where each logical block lives: block tables, pages, and the poison in them."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from m3check import arena
from m3check.paging.run import World
from m3check.paging.tensors import Poison, assignable, filled, poison_value
from m3check.types import BLOCK, Case, blocks

POOL_LAYERS = 3

SPARE_PAGES = 4

TABLE_MARGIN = 4
"""int32 columns left of a block table's row: 16 bytes, so that the row keeps the alignment of a fresh one."""


@dataclass(frozen=True)
class Pages:
    """Where each logical block lives: shuffled page ids in a table cut out of a wider one.

    Columns past a request's last block, and the cells around the table, name a valid page that holds only poison: a kernel
    that follows them computes something wrong instead of crashing. The row of a padded request names another such page, as
    a scheduler's null page, which may be read.
    """

    table: Tensor  # [R, columns] int32
    count: int  # pages that are used or spare
    first: int = 0  # the lowest id in use; those below are never touched

    @classmethod
    def shuffled(
        cls, case: Case, salt: str, device: torch.device | str, world: World | None = None, first: int = 0
    ) -> Pages:
        """Page ids drawn from the case alone; `salt` makes the index and the main cache differ."""
        world = world or World()
        owned = sum(blocks(n) for n in case.kv_lens)
        count = max(owned + SPARE_PAGES, world.pages)
        key = int.from_bytes(hashlib.sha256(f"{case!r}/{salt}".encode()).digest()[:8], "little") >> 1
        order = torch.randperm(count, generator=torch.Generator().manual_seed(key)).to(torch.int32) + first
        if world.contiguous:
            order = order.sort().values
        null, poisoned = order[-2:].tolist()
        if poisoned == first:  # page 0 is what kernels read in place of one that is hidden
            null, poisoned = poisoned, null
        columns = max(case.block_columns + 2, world.columns)
        width = -(-(columns + TABLE_MARGIN) // 16) * 16
        wide = torch.full((len(case.kv_lens) + 2, width), poisoned, dtype=torch.int32)
        start = 0
        for row, n in enumerate(case.kv_lens, start=1):
            wide[row, TABLE_MARGIN : TABLE_MARGIN + columns] = poisoned if n else null
            wide[row, TABLE_MARGIN : TABLE_MARGIN + blocks(n)] = order[start : start + blocks(n)]
            start += blocks(n)
        table = wide.to(device)[1:-1, TABLE_MARGIN : TABLE_MARGIN + columns]
        return cls(table, count, first)

    def readable(self, case: Case) -> Tensor:
        """Bool by page id: the pages of the requests, the null page of padded ones, and page 0, which is always there.

        A kernel may well read page 0 in place of a page that is hidden anyway. It may not follow a column of the table past
        a request's last block: what stands there is not defined.
        """
        named = [self.table[row, : max(blocks(n), 1)] for row, n in enumerate(case.kv_lens)]
        mask = torch.zeros(self.first + self.count, dtype=torch.bool, device=self.table.device)
        mask[0] = True
        if named:
            mask[torch.cat(named).long()] = True
        return mask

    def slots(self, case: Case) -> Tensor:
        """Physical slot (page · 128 + offset) of each of the N logical tokens, int64."""
        parts = []
        for request in case.requests():
            token = torch.arange(request.kv_len, device=self.table.device)
            parts.append(self.table[request.index, token // BLOCK].long() * BLOCK + token % BLOCK)
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=self.table.device)


def far_page(case: Case, index: bool) -> int:
    """A page id whose page, in the index cache or else the main cache, begins past 2^31 elements."""
    layers = POOL_LAYERS if case.layout == "pool" else 1
    return arena.first_page(layers * BLOCK * case.head_dim * (1 if index else 2 * case.kv_heads))


def poisoned_pages(shape: list[int], pages: Pages, poison: Poison, like: Tensor) -> Tensor:
    """Poisoned storage [pages, *shape]; where pages are far, those below the first are mapped and never touched."""
    value = poison_value(like.dtype, poison)
    if not pages.first:
        return filled([pages.count, *shape], value, like.dtype, like.device)
    count = pages.first + pages.count
    storage = arena.allocate(count * math.prod(shape), like.dtype, like.device).view(count, *shape)
    assignable(storage)[pages.first :] = assignable(filled([pages.count, *shape], value, like.dtype, like.device))
    return storage


def watched_pages(page: list[int], pages: Pages, poison: Poison, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(poisoned storage [pages, *page], flat memory to be watched): a page before the first in use, one after the last.

    Where pages are far, those below are mapped and never touched, and no part of what is watched.
    """
    device = pages.table.device
    near = filled([pages.count + 2, *page], poison_value(dtype, poison), dtype, device)
    if not pages.first:
        return near[1:-1], near.flatten()
    count = pages.first + pages.count + 1
    storage = arena.allocate(count * math.prod(page), dtype, device).view(count, *page)
    assignable(storage)[pages.first - 1 :] = assignable(near)
    return storage[:-1], storage[pages.first - 1 :].flatten()
