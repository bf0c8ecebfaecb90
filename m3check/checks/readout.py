"""The membership probe in words: from counts by channel to the tokens that are missing or were attended twice."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from m3check.checks.view import View
from m3check.types import BLOCK

QUARTER = BLOCK // 4
MOST = 4
"""Things that a sentence lists."""


@dataclass(frozen=True)
class Count:
    """One row's counts: D/2 channels by offset, D/2 by (mark of the block, quarter of the block)."""

    counted: Tensor  # [D] output times the number of tokens that the kernel seems to have attended to, fp64
    wanted: Tensor  # [D] int64
    mark: list[int]  # of each block of the request, -1 for none
    listed: list[int]  # blocks that the row lists
    position: int
    number: int  # tokens that the row attends to

    @classmethod
    def of(cls, view: View, row: int, head: int, number: int) -> Count:
        """The counts of one row of one query head."""
        v, case = view.problem.v, view.case
        assert v is not None
        kv_head, half = head // case.gqa, case.head_dim // 2
        start, length = int(view.rows.kv_start[row]), int(view.rows.kv_len[row])
        first = v[start : start + length : BLOCK, kv_head, half:].float()  # a block's first token is of its quarter 0
        mark = first.argmax(-1).div(4, rounding_mode="floor").where(first.any(-1), -1).tolist()
        out = view.actual("out")[row, head].double()
        wanted = (view.expected_out[row, head].double() * number).round()
        ids = view.attended[kv_head, row]
        listed = ids[(ids >= 0) & (ids < view.rows.visible[row])].unique().tolist()
        ratio = _heavier(out * number, wanted)
        return cls(out * number / ratio, wanted.long(), mark, listed, int(view.rows.position[row]), number)

    @property
    def half(self) -> int:
        """Channels of each half."""
        return len(self.wanted) // 2


def _heavier(counted: Tensor, wanted: Tensor) -> float:
    """How much heavier each weight is because other tokens are missing: what makes both halves count the same tokens."""
    half = len(wanted) // 2
    best = (1, math.inf, 1.0)
    for part in (slice(0, None), slice(half, None), slice(0, half)):
        there = (wanted[part] > 0) & (counted[part] > 0.5)
        ratio = float((counted[part][there] / wanted[part][there]).median()) if there.any() else 1.0
        for guess in (1.0, ratio):
            off = (counted / guess).round() - wanted
            uneven = int(off[:half].sum() != off[half:].sum())
            best = min(best, (uneven, float(off.abs().sum()), guess))
    return best[2]


def told(count: Count) -> str:
    """What was attended wrongly, e.g. `token 4224 attended twice; tokens 128–255 missing`."""
    if not (count.counted > 0.5).any():
        return "no token attended: the row is zero"
    whole = count.counted.round()
    if (count.counted - whole).abs().max() > 0.4:
        return f"the {count.number} tokens do not weigh the same, though all logits are 0"
    off = whole.long() - count.wanted
    about = f"{count.number + int(off[count.half :].sum())} tokens attended, wanted {count.number}"
    by_offset, by_block = off[: count.half].clone(), off[count.half :].view(-1, 4).clone()
    said = _blocks(count, by_offset, by_block) + _tokens(count, by_offset, by_block)
    if by_offset.any() or by_block.any():
        said.append(_rest(count, by_offset, by_block))
    text = "; ".join(said[:MOST]) + (f"; and {len(said) - MOST} more" if len(said) > MOST else "")
    return f"{text} ({about})" if said else f"counts are whole but {about}"


def _owner(count: Count, mark: int, extra: bool) -> tuple[int | None, str]:
    """(the block that a mark stands for in this row, what else it may be)."""
    listed = [b for b in count.listed if count.mark[b] == mark]
    others = [b for b, m in enumerate(count.mark) if m == mark and b not in listed]
    if listed:
        return listed[0], f" (or a block that is not listed: {_some(others)})" if extra and others else ""
    return (others[0] if len(others) == 1 else None), f"a block that is not listed: {_some(others)}"


def _some(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:MOST]))
    return shown + (", …" if len(numbers) > MOST else "")


def _runs(count: Count, block: int | None) -> list[int]:
    """Tokens in each quarter of a block that the row may see; all of them in a block that it does not list."""
    listed = block is not None and block in count.listed
    seen = min(BLOCK, count.position + 1 - (block or 0) * BLOCK) if listed else BLOCK
    return [max(0, min(QUARTER, seen - quarter * QUARTER)) for quarter in range(4)]


def _blocks(count: Count, by_offset: Tensor, by_block: Tensor) -> list[str]:
    """Whole blocks, then whole runs of 32 tokens, that are missing or there again; taken off the counts."""
    said = []
    for whole in (True, False):
        for mark in by_block.any(-1).nonzero().flatten().tolist():
            block, other = _owner(count, mark, bool((by_block[mark] > 0).any()))
            runs = _runs(count, block)
            change = by_block[mark].tolist()
            times = [c // n if n and c % n == 0 else 0 for c, n in zip(change, runs, strict=True)]
            if whole and (sum(runs) < 2 or len({t for t, n in zip(times, runs, strict=True) if n}) > 1):
                continue
            found = []
            for quarter, (n, t) in enumerate(zip(runs, times, strict=True)):
                place = torch.arange(quarter * QUARTER, quarter * QUARTER + n, device=by_offset.device) % count.half
                if t and n and (whole or (n > 1 and bool((by_offset[place] * t >= t * t).all()))):
                    by_offset.index_add_(0, place, torch.full_like(place, -t))
                    by_block[mark, quarter] = 0
                    found.append((quarter * QUARTER, n, t))
            said += _spans(block if block in count.listed else None, other, found)
    return said


def _spans(block: int | None, other: str, found: list[tuple[int, int, int]]) -> list[str]:
    """(first offset, tokens, times) of a block in words, neighbours joined."""
    said = []
    while found:
        first, n, times = found.pop(0)
        while found and found[0][0] == first + n and found[0][2] == times:
            n += found.pop(0)[1]
        if block is None:
            said.append(f"{n} tokens of {other} attended")
        else:
            low = block * BLOCK + first
            what = "missing" if times < 0 else "attended twice" if times == 1 else f"attended {times + 1} times"
            said.append(f"tokens {low}–{low + n - 1} {what}{other}")
    return said


def _tokens(count: Count, by_offset: Tensor, by_block: Tensor) -> list[str]:
    """Single tokens, where only one offset of a run fits; taken off the counts."""
    said = []
    for mark in range(len(by_block)):
        for quarter in range(4):
            change = int(by_block[mark, quarter])
            if not change:
                continue
            sign = 1 if change > 0 else -1
            offsets = [quarter * QUARTER + i for i in range(QUARTER)]
            fit = [o for o in offsets if int(by_offset[o % count.half]) * sign > 0]
            if len(fit) > abs(change) or not fit:
                continue  # several tokens could be meant
            block, other = _owner(count, mark, sign > 0)
            share = abs(change) // len(fit)
            if share * len(fit) != abs(change) or any(abs(int(by_offset[o % count.half])) < share for o in fit):
                continue
            for o in fit:
                by_offset[o % count.half] -= sign * share
                said.append(_token(count, block, other, o, sign * share))
            by_block[mark, quarter] = 0
    return said


def _token(count: Count, block: int | None, other: str, offset: int, change: int) -> str:
    if block is None:
        return f"offset {offset} of {other} attended"
    token = block * BLOCK + offset
    if token > count.position:
        return f"token {token} attended, {token - count.position} past the query (causal mask)"
    if block not in count.listed:
        return f"token {token} attended, of {other}"
    if change < 0:
        return f"token {token} missing"
    return f"token {token} attended {'twice' if change == 1 else f'{change + 1} times'}{other}"


def _rest(count: Count, by_offset: Tensor, by_block: Tensor) -> str:
    """What could be several sets of tokens: how many of which runs, and at which offsets."""
    parts = []
    for mark, quarter in by_block.nonzero().tolist():
        block, other = _owner(count, mark, False)
        change, low = int(by_block[mark, quarter]), (block or 0) * BLOCK + quarter * QUARTER
        run = f"tokens {low}–{low + QUARTER - 1}" if block in count.listed else other
        parts.append(f"{abs(change)} {'missing' if change < 0 else 'too many'} of {run}")
    offsets = by_offset.nonzero().flatten().tolist()
    at = f", at offsets {_some(offsets)} (modulo {len(by_offset)})" if offsets else ""
    return "; ".join(parts[:MOST]) + (f"; and {len(parts) - MOST} runs more" if len(parts) > MOST else "") + at
