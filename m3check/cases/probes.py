"""Fills whose right answer is known token by token: each small function makes one tensor of one probe.

A key or a value says which token it belongs to, in digits that every dtype holds exactly. Blocks are told apart by a
*mark*: the blocks that one row lists have different marks, whatever the context (`marks`). What the answers say is read in
m3check/checks/probes.py from the tensors alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from m3check.cases.validity import is_fp8
from m3check.types import BLOCK, Case, Request

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from m3check.cases.fills import Draw

ATTENTION = frozenset({"sparse_attn", "sparse_attn_decode"})
SCORING = frozenset({"index_score", "index_decode_score", "index_decode"})
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


def scores(case: Case) -> str | None:
    """Why a case cannot ask which key gave a block its score."""
    if case.op not in SCORING:
        return f"fill={case.fill} asks block scores; it goes with {', '.join(sorted(SCORING))}"
    return None if case.head_dim >= 16 else f"fill={case.fill} needs 16 channels, got d={case.head_dim}"


def selects(case: Case) -> str | None:
    """Why a case cannot put any score that it likes before a selection."""
    return None if case.op == "index_topk" else f"fill={case.fill} writes scores themselves; it goes with index_topk"


# membership ----------------------------------------------------------------------------------------------------------


def membership(draw: Draw) -> Tensor:
    """Queries are 0, so that all weights are equal and the output times their number counts the attended tokens.

    The channels of a value are two one-hot halves: the token's offset modulo D/2, and its block's mark with the quarter of
    the block. Together they name the token. D/8 blocks of a row have a mark, so that no channel counts more than 32 tokens:
    two roundings to bf16 leave 2 · 2^-8 · 32 = 1/4 of a token. Where a list is longer, heads and requests mark different
    parts of it, and values of the others are 0.
    """
    import torch

    if draw.role == "q":
        return torch.zeros(draw.shape, dtype=_torch_dtype(draw), device=draw.device)
    if draw.role != "v":
        return _normal(draw)
    half = draw.case.head_dim // 2
    offset, mark = _offsets_and_marks(draw, draw.case.head_dim // 8)
    value = torch.zeros(draw.shape)
    value.scatter_(2, (offset % half)[..., None], 1.0)
    value.scatter_(2, (half + 4 * mark.clamp(min=0) + offset // 32)[..., None], 1.0)
    return _made(value * (mark >= 0)[..., None], draw)


# needle and two_keys -------------------------------------------------------------------------------------------------

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
    """One key outweighs all others of its row by 2^160, so that the output is its value; heads and rows take block edges."""
    if draw.role == "v":
        return _values_apart(draw)
    return _digit_keys(draw) if draw.role == "k" else _pointing(draw, pairs=False)


def two_keys(draw: Draw) -> Tensor:
    """Two keys of a row, 4, 8 or 10 nats apart, outweigh all others: the heavier has value 0, the other 1.

    They differ in one digit, so they share a 16-token run, a block, or stand in different blocks and so in different chunks.
    """
    if draw.role == "v":
        offset, mark = _offsets_and_marks(draw, draw.case.head_dim - HIGH - LOW)
        odd = (offset // LOW + offset + mark) % 2
        return _made(odd[..., None].float().expand(draw.shape), draw)
    return _digit_keys(draw) if draw.role == "k" else _pointing(draw, pairs=True)


def _digit_keys(draw: Draw) -> Tensor:
    """Keys [N, Hkv, D]: one-hot in the offset's high digit, its low digit and the block's mark; 0 in unmarked blocks."""
    import torch

    offset, mark = _offsets_and_marks(draw, draw.case.head_dim - HIGH - LOW)
    keys = torch.zeros(draw.shape)
    for channel in (offset // LOW, HIGH + offset % LOW, HIGH + LOW + mark.clamp(min=0)):
        keys.scatter_(2, channel[..., None], KEY)
    return _made(keys * (mark >= 0)[..., None], draw)


def _pointing(draw: Draw, pairs: bool) -> Tensor:
    """Queries [T, Hq, D] that match the three digits of one token, or of two that differ in one digit.

    A digit that matches adds `unit`, one that does not takes two of them away, so that three matches are above 0 and
    anything else is not: no positive scale of a key changes that.
    """
    import math

    import torch

    case, size = draw.case, draw.case.head_dim - HIGH - LOW
    root = math.sqrt(case.head_dim)
    unit = math.ceil(2 * NATS * root / (3 * KEY))  # keys' scales are at least a half
    starts = (0, HIGH, HIGH + LOW)
    q = torch.full(draw.shape, -2.0 * unit)
    for head, request, i, listed, mark in _rows(draw, size):
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
    return _made(q, draw)


def _edge(seen: Mapping[int, int], turn: int) -> tuple[int, int]:
    """(block, offset) number `turn` of a row's edges: ends of blocks first, then of 64, 32 and 16 tokens."""
    edges = [(b, offset) for b, n in seen.items() for offset in (0, n - 1)]
    inner = (63, 64, 31, 32, 95, 96, 15, 16, 111, 112)
    edges += [(b, offset) for offset in inner for b, n in seen.items() if offset < n - 1]
    return edges[turn % len(edges)]


def _pair(seen: Mapping[int, int], mark: Mapping[int, int], turn: int) -> tuple[int, int, int, int]:
    """(block, offset, other block, other offset): the heavier key of even label, then one of odd label; one digit differs."""
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
    ends = [(listed[0], listed[-1])] + list(zip(listed, listed[1:], strict=False))
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


# edge_up and edge_down -----------------------------------------------------------------------------------------------


def edge_up(draw: Draw) -> Tensor:
    """A key's score is its position + 1 (+ a constant of the row and head): a block's maximum names its last visible token."""
    return _edge_scores(draw, 1.0)


def edge_down(draw: Draw) -> Tensor:
    """A key's score is -(position + 1) and the like: a block's maximum, below 0, names its first token."""
    return _edge_scores(draw, -1.0)


def _edge_scores(draw: Draw, sign: float) -> Tensor:
    """Positions in base-8 digits, each in its own channel, its weight shared between query and key: exact in every dtype.

    No sum of |q·k| reaches 2^12 where an operand is fp8, so that the positions start again after 31 blocks; 2^23 otherwise.
    """
    import torch

    from m3check.cases.fills import index_dtypes

    case, dim = draw.case, draw.case.head_dim
    narrow = any(is_fp8(word) for word in index_dtypes(case))
    digits, cycle = (4, 2**12 - BLOCK) if narrow else (7, 2**21 - BLOCK)
    channels = [(5 + 17 * i) % dim for i in range(digits + 1)]
    out = torch.zeros(draw.shape)
    if draw.role == "idx_q":
        row, head = torch.arange(draw.shape[0])[:, None], torch.arange(draw.shape[1])
        out[..., channels[-1]] = sign * ((row + 3 * head) % 8)
        for i in range(digits):
            out[..., channels[i]] = sign * 2.0 ** (3 * i - 3 * i // 2)
    else:
        code = 1 + torch.cat([torch.arange(n) for n in case.kv_lens]) % cycle
        out[..., channels[-1]] = 1.0
        for i in range(digits):
            out[..., channels[i]] = (code >> 3 * i & 7) * 2.0 ** (3 * i // 2)
    return _made(out, draw)


# odd -----------------------------------------------------------------------------------------------------------------

ODD_KINDS = ("half_nan", "most_nan", "all_nan", "infinities", "most_minus_inf", "signed_zeros", "huge")


def odd(draw: Draw) -> Tensor:
    """Rows of scores out of the ordinary, by (head + row) mod 7: NaN in 50, 83 or 100 %, infinities, -0, 1e29 and more."""
    import numpy as np
    import torch

    from m3check.cases import stream

    plain = draw.look_up(np.round(stream.normal_quantiles() * 256) / 256)
    die = draw.look_up(np.array(np.arange(stream.ENTRIES) % 6, dtype=np.float64))
    nan, inf = float("nan"), float("inf")
    huge = plain.clone()
    for i, value in enumerate((1e29, 2e29, 1e30, 3e38, -3e38)):
        huge = torch.where(die == i, value, huge)
    by_kind = (
        torch.where(die % 2 == 0, nan, plain),
        torch.where(die > 0, nan, plain),
        torch.full_like(plain, nan),
        torch.where(die == 0, inf, torch.where(die == 1, -inf, plain)),
        torch.where(die > 0, -inf, plain),
        torch.where(die < 3, -0.0, torch.where(die == 3, 0.0, plain / 256)),
        huge,
    )
    kind = (draw.arange(0) + draw.arange(1)) % len(ODD_KINDS)
    out = by_kind[0]
    for i, values in enumerate(by_kind):
        out = torch.where(kind == i, values, out)
    return out


# marks ---------------------------------------------------------------------------------------------------------------


def _lists(case: Case) -> list[list[list[int]]]:
    """[H][T] the valid ids of each row, in the order of its list."""
    from m3check.cases.ident import case_id
    from m3check.cases.selections import SELECTIONS, visible_blocks
    from m3check.cases.stream import Stream

    ids = SELECTIONS[case.ids](case, Stream(f"{case_id(case)}#ids"))
    visible = visible_blocks(case)
    return [[[b for b in row if 0 <= b < n] for row, n in zip(head, visible, strict=True)] for head in ids.tolist()]


def marks(lists: list[list[int]], count: int, blocks: int, part: int) -> list[int]:
    """A mark below `count` for each of a request's blocks, different ones for the blocks that one row lists.

    Where a row lists more blocks than there are marks, those of its `part` come first and -1 stands for none. Blocks that no
    row lists have marks as well, so that a kernel that reads them is seen.
    """
    of: list[int | None] = [None] * blocks
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


def _marked(draw: Draw, count: int) -> Iterator[tuple[int, Request, list[list[int]], list[int]]]:
    """(kv head, request, its rows' lists, its blocks' marks)."""
    case = draw.case
    for head, rows in enumerate(_lists(case)):
        for request in case.requests():
            lists = rows[request.queries]
            part = head + request.index + case.seed
            yield head, request, lists, marks(lists, count, -(-request.kv_len // BLOCK), part)


def _rows(draw: Draw, count: int) -> Iterator[tuple[int, Request, int, list[int], list[int]]]:
    """(kv head, request, query, its list, marks of the request's blocks)."""
    for head, request, lists, mark in _marked(draw, count):
        for i, listed in enumerate(lists):
            yield head, request, i, listed, mark


def _offsets_and_marks(draw: Draw, count: int) -> tuple[Tensor, Tensor]:
    """(offset within its block, mark of its block) of every token: [N, Hkv] int64."""
    import torch

    case = draw.case
    mark = torch.full((case.total_tokens, case.kv_heads), -1)
    for head, request, _, of in _marked(draw, count):
        if of:
            mark[request.tokens, head] = torch.tensor(of).repeat_interleave(BLOCK)[: request.kv_len]
    offset = torch.cat([torch.arange(n) % BLOCK for n in case.kv_lens])
    return offset[:, None].expand_as(mark), mark


def _normal(draw: Draw) -> Tensor:
    from m3check.cases import stream

    return draw.look_up(stream.normal_quantiles())


def _made(values: Tensor, draw: Draw) -> Tensor:
    """Values that the dtype holds (or rounds alike everywhere), on the device."""
    return values.to(_torch_dtype(draw)).to(draw.device)


def _torch_dtype(draw: Draw) -> torch.dtype:
    from m3check.paging import torch_dtype

    return torch_dtype(draw.dtype)
