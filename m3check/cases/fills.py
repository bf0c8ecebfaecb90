"""How tensor values are made: one small function a fill, each a look-up of random words and some structure.

A fill makes one tensor at a time and is told its role: `idx_q`, `idx_k` (block scores), `scores` (the input of a selection
alone), `q`, `k`, `v` (attention). What it promises is in its first line and is tested in tests/test_probes.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from m3check.cases import probes, scorefills, stream
from m3check.cases.validity import is_fp8
from m3check.types import BLOCK, Case

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from m3check.cases.stream import Table


@dataclass(frozen=True)
class Draw:
    """What a fill needs to make one tensor."""

    case: Case
    role: str
    shape: tuple[int, ...]
    dtype: str  # dtype word
    device: torch.device | str
    stream: stream.Stream

    @property
    def values(self) -> int:
        """How many values the tensor has."""
        count = 1
        for n in self.shape:
            count *= n
        return count

    def look_up(self, table: Table, dtype: str = "") -> Tensor:
        """A tensor of the wanted shape, each value drawn from a table of 65,536 that are equally likely."""
        return stream.look_up(table, self.stream.words(self.values), self.shape, dtype or self.dtype, self.device)

    def arange(self, axis: int) -> Tensor:
        """Positions along one axis, shaped to broadcast."""
        import torch

        view = [1] * len(self.shape)
        view[axis] = -1
        return torch.arange(self.shape[axis], device=self.device).view(view)


def _whole(largest: int) -> Table:
    """Integers in [-largest, largest], equally likely."""
    import numpy as np

    return np.array(np.arange(stream.ENTRIES) % (2 * largest + 1) - largest, dtype=np.float64)


def _binades(lowest: int) -> Table:
    """Both signs, 12 binades from 2^lowest, 3 bits of fraction (which every dtype but e5m2 holds exactly)."""
    import numpy as np

    i = np.arange(stream.ENTRIES)
    fraction, exponent, sign = i & 7, i // 8 % 12, i // 96 % 2
    return np.array((1 + fraction / 8) * (1 - 2 * sign) * 2.0 ** (exponent + lowest), dtype=np.float64)


def largest_integers(draw: Draw) -> tuple[int, int]:
    """How large `integer` queries and keys may be so that no sum of |q·k| leaves what every accumulator keeps exactly.

    That is 2^12 for two fp8 operands (the accumulator of fp8 `wgmma` keeps 13 bits), 2^23 otherwise (fp32). Attention takes
    small ones: its logits must stay within a few nats of each other to mean anything.
    """
    case = draw.case
    if draw.role in ("q", "k"):
        return 2, 2
    exact = {"fp8_e4m3fn": 16, "fp8_e4m3fnuz": 16, "fp8_e5m2": 8, "fp8_e5m2fnuz": 8}
    query, cache = index_dtypes(case)
    limit = 2**12 if is_fp8(query) and is_fp8(cache) else 2**23
    keys = exact.get(cache, 256)
    return max(1, min(exact.get(query, 256), limit // (case.head_dim * keys))), keys


def index_dtypes(case: Case) -> tuple[str, str]:
    """Dtype words of index queries and index keys; a chain's queries follow its index cache into fp8."""
    if case.op not in ("prefill", "decode"):
        return case.dtype, case.cache_dtype
    return (case.index_cache_dtype if is_fp8(case.index_cache_dtype) else case.dtype), case.index_cache_dtype


def gauss(draw: Draw) -> Tensor:
    """N(0, 1), so that logits have a standard deviation near 1; fp32 fills all 24 bits; a row of scores has no ties."""
    import numpy as np

    if draw.role == "scores":
        return _distinct(draw)
    coarse = draw.look_up(stream.normal_quantiles())
    if draw.dtype == "fp32":
        fine = (np.arange(stream.ENTRIES) % 512 - 256) / 2.0**21
        return coarse + draw.look_up(fine)  # exact: bits 2^2 … 2^-21
    return coarse


def _distinct(draw: Draw) -> Tensor:
    """Normal scores on a grid of 2^-8, plus a number below 2^-8 that no other of 8,192 neighbouring blocks has."""
    import numpy as np

    coarse = np.round(stream.normal_quantiles() * 256) / 256
    heads, rows, columns = (draw.arange(axis) for axis in range(3))
    own = (columns * 5167 + rows * 31 + heads * 2477) % 8192
    return draw.look_up(coarse) + own.float() / 2.0**21  # exact: bits 2^2 … 2^-21


def integer(draw: Draw) -> Tensor:
    """Small integers: every q·k is exact in every accumulator, so block scores must compare equal."""
    queries, keys = largest_integers(draw)
    return draw.look_up(_whole({"idx_q": queries, "q": queries, "idx_k": keys, "k": keys, "v": 8}.get(draw.role, 256)))


def wide(draw: Draw) -> Tensor:
    """12 binades; channels cancel in 7 of 8 pairs, so that a dot is small beside its products; |logit| < 1e3."""
    import torch

    if draw.role not in ("q", "k", "idx_q", "idx_k"):
        return draw.look_up(_binades(-6))
    values = draw.look_up(_binades(-10 if draw.role == "q" else -6))  # attention queries stay below 4: bounds the logits
    even, odd = _words(values)[..., 0::2], _words(values)[..., 1::2]
    if draw.role in ("q", "idx_q"):
        odd.copy_(even)
        return values
    sign = {1: 0x80, 2: -0x8000, 4: -0x80000000}[values.element_size()]
    alone = torch.arange(odd.shape[-1], device=values.device) % 8 == 7
    odd.copy_(torch.where(alone, odd, even ^ sign))  # -k: no table entry is zero, so no fnuz NaN can arise
    return values


DEPTH = 56.0
"""In one channel of every attention query, and below zero in that of every key; every float dtype holds it exactly."""


def sunk(draw: Draw) -> Tensor:
    """N(0, 1) but for one channel, which sinks all logits of attention below -100 nats: 0 is no floor for their maximum."""
    import torch

    values = gauss(draw)
    if draw.role in ("q", "k"):
        depth = torch.tensor(DEPTH if draw.role == "q" else -DEPTH).to(values.dtype)
        _words(values)[..., 0] = _words(depth.to(values.device))
    return values


def ties(draw: Draw) -> Tensor:
    """Exact ties: blocks (index keys), scores, or tokens (attention keys) that score the same, in kinds by head and row."""
    if draw.role == "scores":
        return _tied_scores(draw)
    if draw.role == "idx_k":
        return _tied_keys(draw)
    if draw.role == "idx_q":
        return _tied_queries(draw)
    if draw.role == "k":
        return _few_keys(draw)
    return gauss(draw)


TIE_KINDS = ("equal", "two_valued", "descending", "one_exponent", "negative", "signed_zeros")


def _tied_scores(draw: Draw) -> Tensor:
    """Rows of scores [H, T, K], the kind of row by (head + row) mod 6."""
    import torch

    heads, rows, columns = (draw.arange(axis) for axis in range(3))
    bits = draw.look_up(_whole(8)).float() + 8  # 0 … 16
    shape = draw.shape
    coin = bits % 2
    by_kind = (
        torch.full(shape, 0.75, device=draw.device),
        torch.where(coin > 0, 3.0, -1.5),
        (-(columns // 2)).float().expand(shape),  # pairs of equal neighbours, falling
        1 + bits / 64,
        -1 - (bits % 4),
        torch.where(coin > 0, 0.0, -0.0),
    )
    kind = ((heads + rows) % len(TIE_KINDS)).expand(shape)
    out = by_kind[0].clone()
    for i, values in enumerate(by_kind):
        out = torch.where(kind == i, values, out)
    return out


TEMPLATES = 3
"""Different blocks of index keys in `ties`; more blocks than that must tie."""


def _tied_keys(draw: Draw) -> Tensor:
    """Index keys [N, D]: block b holds the keys of template b mod 3, rolled by b; the last channel is 1, 2, 4 or 8."""
    import torch

    case, dim = draw.case, draw.shape[-1]
    wanted = Draw(case, draw.role, (TEMPLATES * BLOCK, dim), draw.dtype, draw.device, draw.stream)
    largest = min(largest_integers(draw)[1], 8)
    template = wanted.look_up(_whole(largest), "fp32").view(TEMPLATES, BLOCK, dim)
    offset = torch.arange(BLOCK, device=draw.device)
    for i in range(TEMPLATES):
        template[i, :, -1] = (1 << (offset + i) % 4).float()
    template = template.to(_torch_dtype(draw.dtype))
    parts = []
    for request in case.requests():
        token = torch.arange(request.kv_len, device=draw.device)
        block = token // BLOCK
        parts.append(_words(template)[block % TEMPLATES, (token + block) % BLOCK])
    return torch.cat(parts).view(template.dtype)


def _tied_queries(draw: Draw) -> Tensor:
    """Index queries [T, H, D]: integers, all zeros, or only a negative last channel, by (head + row) mod 3."""
    import torch

    values = draw.look_up(_whole(min(largest_integers(draw)[0], 8)), "fp32")
    rows, heads = draw.arange(0), draw.arange(1)
    kind = (rows + heads) % 3
    last = draw.arange(2) == draw.shape[-1] - 1
    values = torch.where(kind == 1, 0.0, values)
    values = torch.where(kind == 2, torch.where(last, -1.0, 0.0), values)
    return values.to(_torch_dtype(draw.dtype))


def _few_keys(draw: Draw) -> Tensor:
    """Attention keys [N, Hkv, D]: each token has one of four keys, so that a quarter of all logits are equal."""
    import torch

    tokens, heads, dim = draw.shape
    four = Draw(draw.case, draw.role, (4 * heads, dim), draw.dtype, draw.device, draw.stream)
    keys = _words(four.look_up(stream.normal_quantiles())).view(4, heads, dim)
    which = torch.from_numpy(draw.stream.words(tokens * heads).astype("int64") & 3).to(draw.device).view(tokens, heads)
    chosen = keys[which, torch.arange(heads, device=draw.device)]
    return chosen.view(_torch_dtype(draw.dtype))


def _torch_dtype(word: str) -> torch.dtype:
    from m3check.paging import torch_dtype

    return torch_dtype(word)


def _words(tensor: Tensor) -> Tensor:
    from m3check.paging import words

    return words(tensor)


@dataclass(frozen=True)
class Fill:
    """A named way to make values."""

    name: str
    make: Callable[[Draw], Tensor]
    complaint: Callable[[Case], str | None] = lambda case: None
    """Why a case does not go with it, as one sentence; None where it does."""

    @property
    def summary(self) -> str:
        """What it promises, in one line."""
        return (self.make.__doc__ or "").partition("\n")[0]


FILLS: Mapping[str, Fill] = {
    "gauss": Fill("gauss", gauss),
    "integer": Fill("integer", integer),
    "wide": Fill("wide", wide),
    "ties": Fill("ties", ties),
    "sunk": Fill("sunk", sunk, probes.attends_unscaled),
    "membership": Fill("membership", probes.membership, probes.attends_unscaled),
    "needle": Fill("needle", probes.needle, probes.attends),
    "two_keys": Fill("two_keys", probes.two_keys, probes.attends_unscaled),
    "edge_up": Fill("edge_up", scorefills.edge_up, scorefills.scores),
    "edge_down": Fill("edge_down", scorefills.edge_down, scorefills.scores),
    "close": Fill("close", scorefills.close, scorefills.selects),
    "odd": Fill("odd", scorefills.odd, scorefills.selects),
}
