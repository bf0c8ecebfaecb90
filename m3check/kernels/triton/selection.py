"""The largest keys of each row: a block's score, its forcing and its id in one int64, so that order is total and exact.

A key is forcing (2 init, 1 local, 0 none) · 2^56 + monotone(score) · 2^24 + (2^24 - 1 - id), the score left out where
forced; NONE stands for no block.
Keys differ, so the choice is the same however a row is cut into tiles; equal scores go to the smaller id, NaN is below
-inf, -0 equals +0, and a forced block wins over any score.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3check.kernels.triton import tiles

NONE = tl.constexpr(-1)
ID_MASK = tl.constexpr((1 << 24) - 1)

MERGED = 8
"""Parts that every merge has room for: on a device a context of a million tokens, so that no shorter one compiles anew."""


@triton.jit
def rank_keys(score, block, seen, visible, init_blocks, local_blocks):
    """Keys of blocks with these scores in rows that see `visible` blocks; NONE where not `seen`."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    order = tl.where(score != score, -0x80000000, order) + 0x80000000
    forced = tl.where(block >= visible - local_blocks, 1, tl.where(block < init_blocks, 2, 0)).to(tl.int64)
    order = tl.where(forced > 0, 0, order)
    return tl.where(seen, (forced << 56) | (order << 24) | (ID_MASK - block), NONE)


@triton.jit
def take_largest(keys, TOPK: tl.constexpr, SLOTS: tl.constexpr):
    """The TOPK largest of each row of keys, descending, in SLOTS (a power of two) columns; NONE fills up."""
    slot = tl.arange(0, SLOTS).to(tl.int64)
    top = tl.max(keys, 1)
    taken = tl.where((slot == 0)[None, :], top[:, None], NONE)
    for s in range(1, TOPK):
        top = tl.max(tl.where(keys < top[:, None], keys, NONE), 1)
        taken = tl.where((slot == s)[None, :], top[:, None], taken)
    return taken


@triton.jit
def select_tile(
    row, token, head, live, visible,
    score, stride_st, stride_sh, stride_sk,
    partial, out, stride_ot, stride_oh, stride_ok,
    init_blocks, local_blocks, part, parts,
    TOPK: tl.constexpr, SLOTS: tl.constexpr, COLUMNS: tl.constexpr, STAGE: tl.constexpr,
):  # fmt: skip
    """Choose for a tile of rows. STAGE `whole` reads scores and writes ids, `part` writes keys, `merge` reads those.

    `partial` is [rows, parts, TOPK] int64, contiguous; a part is COLUMNS blocks, in `merge` all parts' keys.
    """
    column = tl.arange(0, COLUMNS).to(tl.int64)
    if STAGE == "merge":
        seen = live[:, None] & (column < parts * TOPK)[None, :]
        keys = tl.load(partial + (row * (parts * TOPK))[:, None] + column[None, :], mask=seen, other=NONE)
    else:
        block = column + part.to(tl.int64) * COLUMNS
        seen = live[:, None] & (block[None, :] < visible[:, None])
        at = (token * stride_st + head * stride_sh)[:, None] + (block * stride_sk)[None, :]
        keys = rank_keys(
            tl.load(score + at, mask=seen, other=0.0), block[None, :], seen, visible[:, None], init_blocks, local_blocks
        )
    taken = take_largest(keys, TOPK, SLOTS)
    slot = tl.arange(0, SLOTS).to(tl.int64)
    mask = live[:, None] & (slot < TOPK)[None, :]
    if STAGE == "part":
        tl.store(partial + ((row * parts + part) * TOPK)[:, None] + slot[None, :], taken, mask=mask)
    else:
        ids = tl.where(taken == NONE, -1, ID_MASK - (taken & ID_MASK))
        at = (token * stride_ot + head * stride_oh)[:, None] + (slot * stride_ok)[None, :]
        tl.store(out + at, ids.to(out.dtype.element_ty), mask=mask)


def launch(kernel, score: Tensor, out: Tensor, topk: int, arguments: tuple[object, ...]) -> None:
    """Select from score [H, T, K] into out [H, T, topk]: in one launch where a row fits a tile, else in parts and a merge.

    `kernel` finds out what each row sees, from `arguments`.
    """
    heads, tokens, columns = score.shape
    if tokens == 0 or columns == 0:
        out.fill_(-1)
        return
    width = tiles.selection_width(columns)
    parts = triton.cdiv(columns, width)
    partial, steps = score, [("whole", width, 1)]
    if parts > 1:
        partial = torch.empty(tokens * heads, parts, topk, dtype=torch.int64, device=score.device)
        steps = [("part", width, parts), ("merge", tiles.power_of_two(max(parts, MERGED) * topk), 1)]
    for stage, wide, programs in steps:
        rows = tiles.selection_rows(tokens * heads, wide)
        kernel[(triton.cdiv(tokens * heads, rows), programs)](
            score, score.stride(1), score.stride(0), score.stride(2),
            partial, out, out.stride(1), out.stride(0), out.stride(2), *arguments, tokens, columns, parts,
            H=heads, TOPK=topk, SLOTS=tiles.power_of_two(topk), ROWS=rows, COLUMNS=wide, STAGE=stage, num_warps=4,
        )  # fmt: skip


def warm_up(kernel, score: Tensor, out: Tensor | None, topk: int, arguments: tuple[object, ...]) -> None:
    """Compile `kernel` for scores [H, T, K] of every K, and ids like `out`. Raises ValueError where there is no row."""
    heads, tokens = score.shape[0], min(score.shape[1], 16)
    if not tokens:
        raise ValueError("a warm-up needs a query")
    for columns in (*tiles.WIDTHS, tiles.WIDTHS[-1] + 16):
        wide = score.new_zeros(heads, tokens, columns)
        ids = torch.empty(heads, tokens, topk, dtype=torch.int32, device=score.device) if out is None else out[:, :tokens]
        launch(kernel, wide, ids, topk, arguments)
