"""Which rows fail, in words: the simplest property that exactly they have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from m3check.types import BLOCK, Case, Request

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Row:
    """One query row."""

    request: Request
    query: int

    @property
    def position(self) -> int:
        """Its token position."""
        return self.request.position(self.query)

    @property
    def visible(self) -> int:
        """How many blocks it sees."""
        return self.request.visible_blocks(self.query)


def rows_of(case: Case) -> list[Row]:
    """The T rows of a case."""
    return [Row(request, i) for request in case.requests() for i in range(request.query_len)]


def _properties(case: Case, rows: list[Row], bad: set[int]) -> Iterator[tuple[str, Callable[[Row], bool]]]:
    """Candidates, the simplest first."""
    yield "all rows", lambda row: True
    yield "all rows that see a token", lambda row: row.position >= 0
    yield "rows that see no token", lambda row: row.position < 0
    first = rows[min(bad)]
    tail = first.request.kv_len % BLOCK
    yield f"all requests with context % {BLOCK} == {tail}", lambda row: row.request.kv_len % BLOCK == tail
    yield "all requests whose last block is not full", lambda row: row.request.kv_len % BLOCK != 0
    yield "all requests whose last block is full", lambda row: row.request.kv_len % BLOCK == 0
    yield f"request {first.request.index} alone", lambda row: row.request.index == first.request.index
    yield "every request but the first", lambda row: row.request.index > 0
    yield "the first query of each request", lambda row: row.query == 0
    yield "the last query of each request", lambda row: row.query == row.request.query_len - 1
    yield "every query but a request's first", lambda row: row.query > 0
    yield "every query but a request's last", lambda row: row.query < row.request.query_len - 1
    yield f"rows that see more than topk = {case.topk} blocks", lambda row: row.visible > case.topk
    yield f"rows that see fewer than topk = {case.topk} blocks", lambda row: 0 < row.visible < case.topk
    yield f"rows that see at most topk = {case.topk} blocks", lambda row: 0 < row.visible <= case.topk
    yield "rows that see more than one block", lambda row: row.visible > 1
    yield "rows whose own block is not full", lambda row: row.position >= 0 and (row.position + 1) % BLOCK != 0
    offset = first.position % BLOCK
    yield f"rows at positions % {BLOCK} == {offset}", lambda row: row.position % BLOCK == offset
    yield f"row {min(bad)} alone", lambda row: row == first


def described(case: Case, wrong: Tensor, among: Tensor | None = None) -> str:
    """The pattern of bad rows [H, T], among those that a suspect changes at all, as `(all requests …; kv heads …)`."""
    rows = rows_of(case)
    bad = set(wrong.any(0).nonzero().flatten().tolist())
    every = set(range(len(rows))) if among is None else set(among.any(0).nonzero().flatten().tolist()) | bad
    if not bad:
        return ""
    words = f"{len(bad)} of {len(rows)} rows"
    for name, holds in _properties(case, rows, bad):
        if {t for t in every if holds(rows[t])} == bad:
            words = name
            break
    heads = wrong.any(1).nonzero().flatten().tolist()
    if len(heads) < len(wrong):
        words += f"; head{'s' * (len(heads) > 1)} {', '.join(map(str, heads[:8]))} of {len(wrong)}"
    return words
