"""Fills that ask attention which tokens it read: each small function makes one tensor of one probe.

A key or a value says which token it belongs to, in digits that every dtype holds exactly: its offset, and the mark of its
block (marks.py). What the answers say is read in m3check/checks/probes.py, from the tensors alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from m3check.cases import stream
from m3check.cases.marks import marked_rows, offsets_and_marks
from m3check.types import BLOCK, Case

if TYPE_CHECKING:
    from torch import Tensor

    from m3check.cases.fills import Draw

ATTENTION = frozenset({"sparse_attn", "sparse_attn_decode"})
DIMS = (64, 128)


def attends(case: Case) -> str | None:
    """Why a case cannot ask which tokens an attention read; None where it can."""
    if case.op not in ATTENTION:
        return f"fill={case.fill} asks attention on given ids; it goes with {', '.join(sorted(ATTENTION))}"
    if case.head_dim not in DIMS:
        return f"fill={case.fill} writes digits into channels; it goes with d=64 and d=128, got d={case.head_dim}"
    return None


def attends_unscaled(case: Case) -> str | None:
    """The same for a probe that needs all tokens alike."""
    if case.scales == "token" or (case.scales != "none" and case.fill == "membership"):
        return f"fill={case.fill} needs tokens that weigh the same, so scale={case.scales} does not go with it"
    return attends(case)


def membership(draw: Draw) -> Tensor:
    """Queries are 0, so that all weights are equal and the output times their number counts the attended tokens.

    The channels of a value are two one-hot halves: the token's offset modulo D/2, and its block's mark with the quarter of
    the block. Together they name the token. D/8 blocks of a row have a mark, so that no channel counts more than 32 tokens:
    two roundings to bf16 leave 2 · 2^-8 · 32 = 1/4 of a token. Where a list is longer, heads and requests mark different
    parts of it, and values of the others are 0.
    """
    import torch

    if draw.role == "q":
        return made(torch.zeros(draw.shape), draw)
    if draw.role != "v":
        return draw.look_up(stream.normal_quantiles())
    half = draw.case.head_dim // 2
    offset, mark = offsets_and_marks(draw.case, draw.case.head_dim // 8)
    value = torch.zeros(draw.shape)
    value.scatter_(2, (offset % half)[..., None], 1.0)
    value.scatter_(2, (half + 4 * mark.clamp(min=0) + offset // 32)[..., None], 1.0)
    return made(value * (mark >= 0)[..., None], draw)


HIGH, LOW = 8, 16
"""Digits of an offset within a block."""

KEY = 56.0
"""What a key holds at its three digits; exact in every dtype."""

NATS = 111.0
"""160 binades: e^-111 times any weight underflows in fp32."""

GAPS = (4.0, 8.0, 10.0)
"""Nats between two keys."""

Picks = dict[tuple[int, int], tuple[int, int]]


def needle(draw: Draw) -> Tensor:
    """One key outweighs all others of its row by 2^160, so that the output is its value; heads and rows take edges."""
    if draw.role == "v":
        return _values_apart(draw)
    return _digit_keys(draw) if draw.role == "k" else _pointing(draw, pairs=False)


def two_keys(draw: Draw) -> Tensor:
    """Two keys of a row, 4, 8 or 10 nats apart, outweigh all others: the heavier has value 0, the other 1.

    They differ in one digit, so they share a 16-token run or a block, or stand in different blocks and maybe chunks.
    """
    if draw.role == "v":
        offset, mark = offsets_and_marks(draw.case, draw.case.head_dim - HIGH - LOW)
        odd = (offset // LOW + offset + mark) % 2
        return made(odd[..., None].float().expand(draw.shape), draw)
    return _digit_keys(draw) if draw.role == "k" else _pointing(draw, pairs=True)


def _digit_keys(draw: Draw) -> Tensor:
    """Keys [N, Hkv, D]: one-hot in the offset's high digit, its low digit and the block's mark; 0 in unmarked blocks."""
    import torch

    offset, mark = offsets_and_marks(draw.case, draw.case.head_dim - HIGH - LOW)
    keys = torch.zeros(draw.shape)
    for channel in (offset // LOW, HIGH + offset % LOW, HIGH + LOW + mark.clamp(min=0)):
        keys.scatter_(2, channel[..., None], KEY)
    return made(keys * (mark >= 0)[..., None], draw)


def _pointing(draw: Draw, pairs: bool) -> Tensor:
    """Queries [T, Hq, D] that match the three digits of one token, or of two that differ in one digit.

    A digit that matches adds `unit`, one that does not takes two of them away, so that three matches are above 0 and
    anything else is not: no positive scale of a key changes that.
    """
    import torch

    case, size = draw.case, draw.case.head_dim - HIGH - LOW
    root = math.sqrt(case.head_dim)
    unit = math.ceil(2 * NATS * root / (3 * KEY))  # keys' scales are at least a half
    starts = (0, HIGH, HIGH + LOW)
    q = torch.full(draw.shape, -2.0 * unit)
    for head, request, i, listed, mark in marked_rows(draw.case, size):
        row = request.query_start + i
        seen = {b: min(BLOCK, request.position(i) + 1 - b * BLOCK) for b in listed if mark[b] >= 0}
        if not seen:
            continue
        first = (row * case.kv_heads + head) * case.gqa
        for g in range(case.gqa):
            query = q[row, head * case.gqa + g]
            block, offset, other, there = _pair(seen, mark, first + g) if pairs else (*_edge(seen, first + g),) * 2
            one = (offset // LOW, offset % LOW, mark[block])
            two = (there // LOW, there % LOW, mark[other])
            gap = round(8 * GAPS[(first + g) // 3 % 3] * root / KEY) / 8
            for start, digit, also in zip(starts, one, two, strict=True):
                query[start + digit] = unit + (gap if digit != also else 0)
                query[start + also] = unit if digit != also else query[start + digit]
    return made(q, draw)


def _edge(seen: Mapping[int, int], turn: int) -> tuple[int, int]:
    """(block, offset) number `turn` of a row's edges: ends of blocks first, then of 64, 32 and 16 tokens."""
    edges = [(b, offset) for b, n in seen.items() for offset in (0, n - 1)]
    inner = (63, 64, 31, 32, 95, 96, 15, 16, 111, 112)
    edges += [(b, offset) for offset in inner for b, n in seen.items() if offset < n - 1]
    return edges[turn % len(edges)]


def _pair(seen: Mapping[int, int], mark: Sequence[int], turn: int) -> tuple[int, int, int, int]:
    """(block, offset, other block, other offset): the heavier key of even label, the other of odd label."""
    listed = list(seen)
    choices: list[tuple[int, int, int, int]] = []
    for a, b in _far_first(listed):
        if (mark[a] + mark[b]) % 2:
            offset = min(seen[a], seen[b]) - 1 - len(choices) % 2
            choices.append((a, max(offset, 0), b, max(offset, 0)))
    within = []
    for b in listed:
        n = seen[b]
        within += [(b, first, b, first + step) for first, step in ((0, 1), (n - 2, 1), (30, 16)) if 0 <= first < n - step]
    # label = high + low + mark: neighbours in the low or in the high digit have different ones
    within = [(b, x, b, y) for b, x, _, y in within if abs(y // LOW - x // LOW) + abs(y % LOW - x % LOW) == 1]
    found = [pair for both in _zipped(choices, within) for pair in both]
    if not found:
        return listed[0], 0, listed[0], 0
    a, x, b, y = found[turn % len(found)]
    return (a, x, b, y) if (x // LOW + x + mark[a]) % 2 == 0 else (b, y, a, x)


def _far_first(listed: list[int]) -> Iterator[tuple[int, int]]:
    """Pairs of slots: the ends of the list, neighbours, then all others."""
    ends = [(listed[0], listed[-1]), *pairwise(listed)]
    yield from dict.fromkeys(ends)
    for i, a in enumerate(listed):
        yield from ((a, b) for b in listed[i + 2 :] if (a, b) != ends[0])


def _zipped(
    a: list[tuple[int, int, int, int]], b: list[tuple[int, int, int, int]]
) -> Iterator[list[tuple[int, int, int, int]]]:
    for i in range(max(len(a), len(b))):
        yield [x[i % len(x)] for x in (a, b) if x]


def _values_apart(draw: Draw) -> Tensor:
    """Values [N, Hkv, D] from ±1/2 to below ±4 with 3 bits of fraction: no zero, no subnormal, no two tokens alike."""
    import numpy as np

    i = np.arange(1 << 16)
    table = (1 + (i & 7) / 8) * 2.0 ** (i // 8 % 3 - 1) * (1 - 2 * (i // 24 % 2))
    return draw.look_up(np.array(table, dtype=np.float64))


def made(values: Tensor, draw: Draw) -> Tensor:
    """Values in the dtype and on the device of a draw."""
    from m3check.paging import torch_dtype

    return values.to(torch_dtype(draw.dtype)).to(draw.device)
