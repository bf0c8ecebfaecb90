"""Cases of the op `mla_sparse`: queries over one latent key for each token, and lists of tokens with -1 anywhere.

`h=1`, `g` is the number of query heads, `d` the channels of a latent key (576), `topk` the ids of a row. A row's list names
distinct tokens at or before its own position, in random order. Beside the words of other lists there are `late` (the first
half of the slots is -1, so that whole leading tiles are), `empty` (every third row names no token at all) and `beyond` (as
`holes`, but half of the unused slots name rows that the cache does not have; here they are BEYOND).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from m3check.cases.cost import Estimate
from m3check.cases.families import Family
from m3check.types import BEYOND, ROPE, Case

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    Ids = npt.NDArray[np.int64]

READS = frozenset(
    {"kv_heads", "gqa", "head_dim", "topk", "dtype", "cache_dtype", "layout", "ids", "fill", "seed"}
)  # fmt: skip
LISTS = ("full", "ascending", "short", "holes", "late", "empty", "beyond")
FILLS = ("gauss", "integer", "wide", "sunk")
DTYPES = ("bf16", "fp16", "fp32")
STEP = 1.5e-3
"""Interpreted seconds for 16 heads and 16 tokens of 576 channels."""


def complaint(case: Case) -> str | None:
    """One KV head, a latent key of 64 rotary channels beside a power of two, ids in whole tiles of 16."""
    value = case.head_dim - ROPE
    if case.kv_heads != 1:
        return f"latent keys are one head: h=1, got {case.kv_heads}"
    if value < 16 or value & (value - 1):
        return f"d is a power of two (at least 16) and {ROPE} rotary channels more, got {case.head_dim}"
    if case.topk % 16:
        return f"topk is a multiple of 16, got {case.topk}"
    if case.ids not in LISTS:
        return f"mla_sparse has no ids={case.ids}; known here: {', '.join(LISTS)}"
    if case.fill not in FILLS:
        return f"mla_sparse has no fill={case.fill}; known here: {', '.join(FILLS)}"
    if case.layout == "nhd":
        return "layout=nhd orders the heads of a cache, and latent keys are one head; known here: hnd, pool"
    if case.dtype not in DTYPES or case.cache_dtype != case.dtype:
        return f"latent keys have the queries' dtype, {', '.join(DTYPES)}; got {case.dtype} and {case.cache_dtype}"
    return None


def make(case: Case, draw: Callable[..., Tensor], device: Any) -> Mapping[str, Any]:
    """q [T, Hq, D], k [N, 1, D], v its first D - 64 channels, topk_idx [1, T, topk] of positions in the row's request."""
    import torch

    keys = draw("k", (case.total_tokens, 1, case.head_dim), case.cache_dtype)
    return {
        "q": draw("q", (case.total_queries, case.heads, case.head_dim), case.dtype),
        "k": keys,
        "v": keys[..., :-ROPE],
        "topk_idx": torch.from_numpy(_lists(case)[None]).to(torch.int32).to(device),
    }


def _lists(case: Case) -> Ids:
    """[T, topk] tokens of each row."""
    import numpy as np

    from m3check.cases.ident import case_id
    from m3check.cases.stream import Stream

    stream = Stream(f"{case_id(case)}#ids")
    ids = np.full((case.total_queries, case.topk), -1, dtype=np.int64)
    slots = np.arange(case.topk)
    for request in case.requests():
        for i in range(request.query_len):
            row = request.query_start + i
            seen = request.position(i) + 1
            order = np.argsort(stream.below(1 << 30, [seen]), kind="stable")
            room = slots[case.topk // 2 :] if case.ids == "late" else slots
            if case.ids == "short":
                room = room[: max(1, case.topk // 3)]
            if case.ids in ("holes", "beyond"):
                room = slots[stream.below(3, [case.topk]) > 0]
            if case.ids == "beyond":
                ids[row, ::2] = BEYOND
            chosen = order[: len(room)]
            if case.ids == "ascending":
                chosen = np.sort(chosen)
            if case.ids != "empty" or row % 3 != 1:
                ids[row, room[: len(chosen)]] = chosen
    return ids


def estimate(case: Case) -> Estimate:
    """By tiles of 16 heads and 16 tokens; on a device by the reference's products."""
    tiles = case.total_queries * -(-case.heads // 16) * -(-case.topk // 16)
    products = case.total_queries * case.heads * case.topk * case.head_dim
    values = case.total_tokens * case.head_dim
    return Estimate(0.15 + STEP * tiles + values * 2e-8, 0.05 + products * 1e-12 + values * 2e-9)


FAMILY = Family(
    reads={"mla_sparse": READS},
    complaint=complaint,
    make=make,
    estimate=estimate,
    ids=frozenset({"late", "empty", "beyond"}),
)
