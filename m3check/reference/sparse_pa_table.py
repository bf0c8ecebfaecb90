"""Which 16-token pages a paged attention must walk so that it sees what block-sparse attention sees.

    pages[t] = the pages of the listed blocks before the query's own, in the order of the list, then those of its own block
    context[t] = 128 · (listed blocks before its own) + the tokens of its own block that it sees, if that is listed

A paged attention reads the first `context` tokens of a row's pages, so only the last block may be cut: the query's own goes
last. Page 8·b + j stands for tokens 16·j … 16·j + 15 of block b; a cell that no listed block fills holds -1, which stands
for page id 0. Ids that are negative or not visible are left out, and a dead row has no pages.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from m3check.types import BLOCK, Request

PAGE = 16
"""Tokens of a page of AITER's paged attention."""

PAGES = BLOCK // PAGE


def sparse_pa_table(topk_idx: Tensor, requests: Sequence[Request]) -> tuple[Tensor, Tensor]:
    """(pages [T, topk · 8] int64, context [T] int64) of the lists [1, T, topk] of one head."""
    lists = topk_idx[0].tolist()
    pages = torch.full((len(lists), topk_idx.shape[-1] * PAGES), -1, dtype=torch.int64)
    context = torch.zeros(len(lists), dtype=torch.int64)
    for request in requests:
        for i in range(request.query_len):
            row, position = request.query_start + i, request.position(i)
            if position < 0:
                continue
            own = position // BLOCK
            earlier = [b for b in lists[row] if 0 <= b < own]
            walked = earlier + [own] * (own in lists[row])
            cells = [PAGES * b + j for b in walked for j in range(PAGES)]
            pages[row, : len(cells)] = torch.tensor(cells, dtype=torch.int64)
            context[row] = BLOCK * len(earlier) + (position % BLOCK + 1 if own in lists[row] else 0)
    return pages.to(topk_idx.device), context.to(topk_idx.device)
