"""Fills for block scores and their selection: scores that name the token they come from, and scores out of the ordinary."""

from __future__ import annotations

from typing import TYPE_CHECKING

from m3check.cases import stream
from m3check.cases.probes import made
from m3check.cases.validity import is_fp8
from m3check.types import BLOCK, Case

if TYPE_CHECKING:
    from torch import Tensor

    from m3check.cases.fills import Draw

SCORING = frozenset({"index_score", "index_decode_score", "index_decode"})


def scores(case: Case) -> str | None:
    """Why a case cannot ask which key gave a block its score."""
    if case.op not in SCORING:
        return f"fill={case.fill} asks block scores; it goes with {', '.join(sorted(SCORING))}"
    return None if case.head_dim >= 16 else f"fill={case.fill} needs 16 channels, got d={case.head_dim}"


def selects(case: Case) -> str | None:
    """Why a case cannot put any score that it likes before a selection."""
    return None if case.op == "index_topk" else f"fill={case.fill} writes scores themselves; it goes with index_topk"


def edge_up(draw: Draw) -> Tensor:
    """A key's score is its position + 1 (+ a constant of its row and head): a block's maximum names its last token."""
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
    return made(out, draw)


def close(draw: Draw) -> Tensor:
    """Neighbouring fp32 numbers around 1 or, every other row, -1, in an order of each row's own: no bit may be left out."""
    import torch

    heads, rows, columns = (draw.arange(axis) for axis in range(3))
    rank = (columns * (6007 + 31 * rows + 37 * heads) % 8191).argsort(stable=True, dim=-1).argsort(-1)
    step = (rank - draw.shape[2] // 2).int()
    one = torch.ones(1, device=draw.device).view(torch.int32)  # as bits, which count numbers
    return (one + step).view(torch.float32) * (1.0 - (heads + rows) % 2 * 2.0)


ODD_KINDS = ("half_nan", "most_nan", "all_nan", "infinities", "most_minus_inf", "signed_zeros", "huge")


def odd(draw: Draw) -> Tensor:
    """Rows of scores out of the ordinary, by (head + row) mod 7: NaN in 50, 83 or 100 %, infinities, -0, 1e29 and more."""
    import numpy as np
    import torch

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
