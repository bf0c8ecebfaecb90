"""The shapes of real MiniMax-M3 prefill calls, from m3check/data/m3_prefill_production.csv (its source is told there).

A row gives the number of requests, their query tokens in all and the longest visible length; how the tokens are shared
among the requests was not recorded and is made up here, the same way everywhere.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from m3check.types import Case

DATA = Path(__file__).parent.parent / "data"

PARTS = ("index_score", "index_topk", "sparse_attn")
"""Each row is tried on the ops of the prefill chain one by one: a whole chain would be judged on other people's ids."""


@dataclass(frozen=True)
class Row:
    """One stratum of recorded calls."""

    batch: int
    total_q: int
    max_final_kv: int
    weight: int  # how many of the 14,805 recorded calls it stands for


@lru_cache
def rows() -> tuple[Row, ...]:
    """The rows of the file, in its order."""
    text = (DATA / "m3_prefill_production.csv").read_text(encoding="utf-8")
    lines = csv.DictReader(line for line in text.splitlines() if line and not line.startswith("#"))
    return tuple(Row(**{word: int(figure) for word, figure in line.items()}) for line in lines)


@lru_cache
def _weights() -> dict[Case, int]:
    return {_case(op, row): row.weight for op in PARTS for row in rows()}


def production() -> tuple[Case, ...]:
    """One case for each row and op, with M3's own heads and dimensions."""
    return tuple(_weights())


def weight(case: Case) -> int:
    """How many recorded calls a case stands for; 0 for a case that is not of this tier."""
    return _weights().get(case, 0)


def _case(op: str, row: Row) -> Case:
    query_lens = _shares(row.total_q, row.batch)
    longest = row.max_final_kv
    # The first request is the longest; the others have from all to a sixth of its prefix, never at a block edge by design.
    kv_lens = [longest] + [
        query_len + (longest - query_lens[0]) * (6 - i % 6) // 6 for i, query_len in enumerate(query_lens[1:], start=1)
    ]
    return Case(op=op, query_lens=tuple(query_lens), kv_lens=tuple(min(n, longest) for n in kv_lens))


def _shares(total: int, count: int) -> list[int]:
    """`total` cut into `count` uneven parts, the largest first: request i weighs 2 · count - i."""
    weights = [2 * count - i for i in range(count)]
    shares = [total * w // sum(weights) for w in weights]
    shares[0] += total - sum(shares)
    return shares
