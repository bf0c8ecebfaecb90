"""Marks: small numbers that tell the blocks of a row's list apart, whatever the context and the ids."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from m3check.cases.stream import Stream
from m3check.types import BLOCK, Case, Request, blocks

if TYPE_CHECKING:
    from torch import Tensor


def _lists(case: Case) -> list[list[list[int]]]:
    """[H][T] the valid ids of each row, in the order of its list."""
    from m3check.cases.ident import case_id
    from m3check.cases.selections import SELECTIONS, visible_blocks

    ids = SELECTIONS[case.ids](case, Stream(f"{case_id(case)}#ids"))
    visible = visible_blocks(case)
    return [[[b for b in row if 0 <= b < n] for row, n in zip(head, visible, strict=True)] for head in ids.tolist()]


def marks(lists: list[list[int]], count: int, size: int, part: int) -> list[int]:
    """A mark below `count` for each of a request's `size` blocks, different ones for the blocks that one row lists.

    Where a row lists more blocks than there are marks, those of its `part` come first and -1 stands for none. Blocks that
    no row lists have marks as well, so that a kernel that reads them is seen.
    """
    of: list[int | None] = [None] * size
    rows_of: dict[int, list[int]] = {}
    for row, listed in enumerate(lists):
        for block in listed:
            rows_of.setdefault(block, []).append(row)
    used: list[set[int]] = [set() for _ in lists]
    for listed in lists:
        start = part * count % max(len(listed), 1)
        for block in listed[start:] + listed[:start]:
            if of[block] is None:
                taken = set[int]().union(*(used[row] for row in rows_of[block]))
                mark = of[block] = next((mark for mark in range(count) if mark not in taken), -1)
                for row in rows_of[block]:
                    used[row].add(mark)
    return [block % count if mark is None else mark for block, mark in enumerate(of)]


def _marked(case: Case, count: int) -> Iterator[tuple[int, Request, list[list[int]], list[int]]]:
    """(kv head, request, its rows' lists, its blocks' marks)."""
    for head, rows in enumerate(_lists(case)):
        for request in case.requests():
            lists = rows[request.queries]
            part = head + request.index + case.seed
            yield head, request, lists, marks(lists, count, blocks(request.kv_len), part)


def marked_rows(case: Case, count: int) -> Iterator[tuple[int, Request, int, list[int], list[int]]]:
    """(kv head, request, query, its list, marks of the request's blocks)."""
    for head, request, lists, mark in _marked(case, count):
        for i, listed in enumerate(lists):
            yield head, request, i, listed, mark


def offsets_and_marks(case: Case, count: int) -> tuple[Tensor, Tensor]:
    """(offset within its block, mark of its block) of every token: [N, Hkv] int64."""
    import torch

    mark = torch.full((case.total_tokens, case.kv_heads), -1)
    for head, request, _, of in _marked(case, count):
        if of:
            mark[request.tokens, head] = torch.tensor(of).repeat_interleave(BLOCK)[: request.kv_len]
    offset = torch.cat([torch.arange(n) % BLOCK for n in case.kv_lens])
    return offset[:, None].expand_as(mark), mark
