"""Which batches a layer is given: the case's own, and another one before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from m3check.types import BLOCK, Case

if TYPE_CHECKING:
    from m3check.paging import Pages


@dataclass(frozen=True)
class Rows:
    """A batch of some of the case's requests, with lengths of its own."""

    requests: tuple[int, ...]
    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]

    @classmethod
    def of(cls, case: Case) -> Rows:
        """The case's own batch."""
        return cls(tuple(range(len(case.kv_lens))), case.query_lens, case.kv_lens)

    def placed(self, pages: Pages) -> tuple[list[int], list[int]]:
        """(position, slot) of each query token; 0 and -1 in rows that see no token."""
        table = pages.table.tolist()
        positions, slots = [], []
        for request, query_len, kv_len in zip(self.requests, self.query_lens, self.kv_lens, strict=True):
            for position in range(kv_len - query_len, kv_len):
                page, offset = divmod(max(position, 0), BLOCK)
                positions.append(max(position, 0))
                slots.append(table[request][page] * BLOCK + offset if position >= 0 else -1)
        return positions, slots


def earlier(case: Case, how: str) -> Rows:
    """The batch before: as many requests with half their tokens, `other` with another number of decoded ones.

    Stale metadata are of a batch of the same shape. Lengths are never below the number of queries, nor 0: what was captured
    was alive.
    """
    halves = tuple(max(q, kv // 2) for q, kv in zip(case.query_lens, case.kv_lens, strict=True))
    whole = Rows(tuple(range(len(halves))), case.query_lens, halves)
    if how != "other":
        return whole
    n = case.decodes
    live = [i for i, kv in enumerate(case.kv_lens) if kv >= case.query_lens[i]] or [0]
    if n < len(case.kv_lens) and n:  # every request as a decode: more decoded rows than this batch has
        chosen, length = [i for i in range(len(case.kv_lens)) if i in live], case.query_lens[0]
        lengths = [min(length, case.query_lens[i]) for i in chosen]
        chosen = [i for i, q in zip(chosen, lengths, strict=True) if q == length]
        return Rows(tuple(chosen), (length,) * len(chosen), tuple(case.kv_lens[i] for i in chosen))
    chosen = live[: max(1, len(live) // 2)]  # fewer requests
    return Rows(tuple(chosen), tuple(case.query_lens[i] for i in chosen), tuple(case.kv_lens[i] for i in chosen))
