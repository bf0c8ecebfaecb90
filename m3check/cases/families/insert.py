"""Cases of `qknorm_rope_insert`: fresh queries and keys before their norm, positions, and which tokens get a slot.

A request's fresh tokens are its queries: query i stands at position kv_len - query_len + i. Pages hold the blocks in which
fresh tokens come to lie and no others, so a position of a million costs no million tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from m3check.cases.families import Family
from m3check.types import Case

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ROTARY = 64
"""Channels of a head that M3 rotates: half of its 128."""

THETA, OTHER_THETA = 5_000_000, 10_000
"""M3's rope_theta, and that of cases that rotate another number of channels."""

SPREAD = 29
LOWEST = {"bf16": -16, "fp16": -20}
"""`wide` spreads the sizes of rows over so many binades, from so low on: eps is all of a variance, or nothing of it."""

LOUD = 4
"""What weights of `wide` are multiplied by, so that keys and index heads pass e4m3's largest number as values do."""

_TURN = 1 << 32

SKIPS = frozenset({"skip_first", "skip_last", "skip_some", "skip_all", "skip_apart"})
"""Words of `ids`: which tokens have no slot, as padding has none; by `skip_apart` not the same in both caches."""


def complaint(case: Case) -> str | None:
    """Why a case makes no sense."""
    if case.dtype not in ("bf16", "fp16"):
        return f"queries and keys before their norm are bf16 or fp16, got {case.dtype}"
    if case.rotary_dim % 8 or not 8 <= case.rotary_dim <= case.head_dim:
        return f"a multiple of 8 channels is rotated, 8 to {case.head_dim}; got rotary={case.rotary_dim}"
    if case.fill not in ("gauss", "wide"):
        return f"fill={case.fill} says nothing about a norm; known here: gauss, wide"
    if case.ids != "full" and case.ids not in SKIPS:
        return f"ids={case.ids} are no slots; known here: full, {', '.join(sorted(SKIPS))}"
    if case.layer == "dense" and (case.cache_dtype, case.index_cache_dtype, case.ids, case.layout, case.index_heads) != (
        "bf16", "bf16", "full", "hnd", 0
    ):  # fmt: skip
        return "layer=dense inserts nothing and has no index branch: cache, icache, ids, layout and ih must be left out"
    if case.layer == "skip_index" and case.index_cache_dtype != "bf16":
        return "layer=skip_index has no index cache: icache must be left out"
    if case.ids == "skip_apart" and case.layer != "sparse":
        return f"ids=skip_apart tells two caches apart, and layer={case.layer} has no index cache"
    if case.layer != "dense" and not case.cache_dtype.startswith("fp8") and case.cache_dtype != case.dtype:
        return f"a cache that is not fp8 has the dtype of the keys, {case.dtype}; got cache={case.cache_dtype}"
    index = case.index_cache_dtype
    if case.layer == "sparse" and index != case.dtype and not index.startswith("fp8_e4m3"):
        return f"an index cache is {case.dtype} like the keys or fp8_e4m3; got icache={index}"
    return None


def make(case: Case, draw: Callable[..., Tensor], device: Any) -> dict[str, Any]:
    """`more`: fresh heads `x_*` [T, heads, 128] of q, k, v, idx_q and idx_k, their norm weights `w_*` [128] (v has none),
    `cos_sin` [positions, rotary_dim], `positions` [T] int64, `kept` and `kept_idx` [T] bool (has a slot in the main cache,
    in the index cache), `eps` and `q_scale` (0-d, fp64).

    A layer that works on no index branch has 0 heads of idx_q and idx_k.
    """
    import torch

    tokens, index = case.total_queries, case.layer == "sparse"
    heads = {
        "q": case.heads,
        "k": case.kv_heads,
        "v": case.kv_heads,
        "idx_q": case.index_width * index,
        "idx_k": int(index),
    }
    more: dict[str, Tensor] = {}
    for i, (name, count) in enumerate(heads.items()):
        x = draw(f"x_{name}", (tokens, count, case.head_dim), case.dtype)
        if case.fill == "wide":
            row = torch.arange(tokens, device=device)[:, None, None] * 7 + torch.arange(count, device=device)[:, None] * 11
            x = x * torch.exp2(((row + 5 * i) % SPREAD + LOWEST[case.dtype]).double()).to(x.dtype)
        more[f"x_{name}"] = x
        if name != "v":
            more[f"w_{name}"] = draw(f"w_{name}", (case.head_dim,), case.dtype) * (LOUD if case.fill == "wide" else 1)
    more["positions"] = positions(case, device)
    more["cos_sin"] = table(more["positions"], more["x_q"].dtype, case.rotary_dim)
    more["kept"], more["kept_idx"] = kept(case).to(device), kept(case, shifted=1).to(device)
    more["eps"] = torch.tensor(float(case.eps), dtype=torch.float64)
    more["q_scale"] = torch.tensor(7 / 64 if case.queries in ("fp8", "both") else 1.0, dtype=torch.float64)
    return {"more": more}


def positions(case: Case, device: Any) -> Tensor:
    """Token position [T] int64 of each row."""
    import torch

    parts = [torch.arange(request.prefix, request.kv_len) for request in case.requests()]
    return torch.cat(parts).to(device)


def kept(case: Case, shifted: int = 0) -> Tensor:
    """Which rows [T] bool have a slot; `skip_apart` leaves out those that stand so many further."""
    import torch

    row = torch.arange(case.total_queries)
    return {
        "full": row >= 0,
        "skip_first": row > 0,
        "skip_last": row < len(row) - 1,
        "skip_some": row % 3 != 1,
        "skip_all": row < 0,
        "skip_apart": row % 3 != 1 + shifted,
    }[case.ids]


def table(positions: Tensor, dtype: torch.dtype, rotary: int = ROTARY) -> Tensor:
    """Cosines and sines [longest position + 2, rotary] of the positions and their neighbours; NaN at all others.

    Turns are counted in 2^-32 and looked up with 16 bits, on a grid of 2^-14: no library's last bit matters.
    """
    import torch

    theta = THETA if rotary == ROTARY else OTHER_THETA
    steps = [round(_TURN * theta ** (-2 * i / rotary) / (2 * math.pi)) for i in range(rotary // 2)]
    angle = torch.arange(1 << 16, dtype=torch.float64) * (2 * math.pi / (1 << 16))
    cos, sin = ((wave * 2**14).round().div(2**14).to(dtype).to(positions.device) for wave in (angle.cos(), angle.sin()))
    longest = int(positions.max()) if len(positions) else 0
    found = torch.full((longest + 2, rotary), float("nan"), dtype=dtype, device=positions.device)
    near = torch.cat([positions - 1, positions, positions + 1]).clamp(min=0).unique()
    turn = near[:, None] * torch.tensor(steps, device=positions.device) % _TURN >> 16
    found[near] = torch.cat([cos[turn], sin[turn]], dim=-1)
    return found


def estimate(case: Case) -> Any:
    """Seconds: measured interpreted on two cores, and made to hand out long cases first."""
    from m3check.cases.cost import CALL, DEVICE_CALL, DEVICE_VALUE, Estimate

    values = case.total_queries * (case.heads + 3 * case.kv_heads + 1) * case.head_dim
    angles = case.context * case.rotary_dim  # the table reaches to the longest position
    return Estimate(CALL + values * 1.5e-6 + angles * 2e-8, DEVICE_CALL + (20 * values + angles) * DEVICE_VALUE)


READS = frozenset(
    {"kv_heads", "gqa", "dtype", "cache_dtype", "index_cache_dtype", "layout", "ids", "layer", "queries", "rotary_dim",
     "index_heads", "eps", "fill", "seed"}
)  # fmt: skip

FAMILY = Family({"qknorm_rope_insert": READS}, complaint, make, estimate, SKIPS)
