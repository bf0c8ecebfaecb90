"""Wrong places: rows that stand elsewhere, requests that read each other's pages, keys and values moved along a request."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from m3check.types import BLOCK, Case, Inputs, Request

if TYPE_CHECKING:
    from torch import Tensor

Change = Callable[[Inputs], "Inputs | None"]
"""The inputs on which the reference computes the wrong answer; None where the defect has nothing to act on."""


@dataclass(frozen=True)
class Geometry(Case):
    """A case whose rows stand where `rows` says: of lengths, the reference asks a case for nothing but its requests."""

    rows: tuple[Request, ...] = ()

    def requests(self) -> Iterator[Request]:
        """Runs of rows, each a request of its own that reads the keys and values of the original one."""
        return iter(self.rows)


def positions(case: Case) -> list[int]:
    """Token position of each of the T rows, -1 for a dead one."""
    return [max(-1, request.position(i)) for request in case.requests() for i in range(request.query_len)]


def moved(move: Callable[[Request, int], int]) -> Change:
    """Query i of a request stands at `move(request, i)`: before its first token it sees none, past its last one all."""

    def change(inputs: Inputs) -> Inputs | None:
        case, rows = inputs.case, list[Request]()
        for request in case.requests():
            for i in range(request.query_len):
                end = max(-1, min(move(request, i), request.kv_len - 1)) + 1
                row = Request(len(rows), request.query_start + i, 1, request.kv_start, end)
                rows[-1:] = _joined(rows[-1], row) if rows else [row]
        figures = {name: getattr(case, name) for name in Case.__dataclass_fields__}
        other = Geometry(**figures, rows=tuple(rows))
        return replace(inputs, case=other) if positions(other) != positions(case) else None

    return change


def _joined(a: Request, b: Request) -> list[Request]:
    """A row as part of the request before it, where it stands one token further; else both."""
    if a.kv_start == b.kv_start and b.kv_len == a.kv_len + 1 and a.kv_len > 0:
        return [replace(a, query_len=a.query_len + 1, kv_len=b.kv_len)]
    return [a, b]


EARLIER = moved(lambda request, i: request.position(i) - 1)
LATER = moved(lambda request, i: request.position(i) + 1)
UNMASKED = moved(lambda request, i: request.kv_len - 1)
LAST_LOST = moved(lambda request, i: min(request.position(i), request.kv_len - 2))
BLOCK_LOST = moved(lambda request, i: request.position(i) - BLOCK)
BLOCK_MORE = moved(lambda request, i: request.position(i) + BLOCK)
DRAFTS_LOST = moved(lambda request, i: request.position(i) - (request.query_len - 1))


def requests_exchanged(inputs: Inputs) -> Inputs | None:
    """The first and the last request read each other's first pages."""
    live = [r for r in inputs.case.requests() if r.query_len and r.kv_len]
    if len(live) < 2:
        return None
    a, b = live[0].kv_start, live[-1].kv_start
    length = min(live[0].kv_len, live[-1].kv_len)

    def exchange(x: Tensor) -> Tensor:
        other = x.clone()
        other[a : a + length], other[b : b + length] = x[b : b + length], x[a : a + length]
        return other

    return cached(inputs, exchange)


def cached(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """Whatever of index keys, keys and values there is, changed."""
    return replace(
        inputs,
        idx_k=None if inputs.idx_k is None else change(inputs.idx_k),
        k=None if inputs.k is None else change(inputs.k),
        v=None if inputs.v is None else change(inputs.v),
    )


def next_block(x: Tensor, case: Case) -> Tensor:
    """Rows [N, ...] moved forward by a block within each request that has more than one, the first block to the end."""
    import torch

    from m3check.paging import words

    # Bits move, not values: a device cannot roll fp8.
    parts = [words(x[request.tokens]) for request in case.requests()]
    return torch.cat([part.roll(-BLOCK, 0) if len(part) > BLOCK else part for part in parts]).view(x.dtype)


DIALECTS = {
    "float8_e4m3fn": "float8_e4m3fnuz",
    "float8_e4m3fnuz": "float8_e4m3fn",
    "float8_e5m2": "float8_e5m2fnuz",
    "float8_e5m2fnuz": "float8_e5m2",
}


def other_dialect(inputs: Inputs) -> Inputs | None:
    """fp8 codes read in the other dialect (fn as fnuz)."""
    import torch

    keys = inputs.idx_k if inputs.idx_k is not None else inputs.k
    word = str(keys.dtype).removeprefix("torch.") if keys is not None else ""
    other: torch.dtype | None = getattr(torch, DIALECTS[word]) if word in DIALECTS else None
    return cached(inputs, lambda x: x.view(other)) if other is not None else None
