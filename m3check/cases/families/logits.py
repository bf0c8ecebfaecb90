"""Cases of `mqa_logits` and `paged_mqa_logits`: fp8 index queries of `g` heads over fp8 keys with a scale for each token.

`h=1` (keys are shared), `g` index heads, `d` channels. Beside idx_q and idx_k stand `key_scale` [N] fp32, no two neighbours
alike and none a power of two, and `weights` [T, H] fp32 of both signs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from m3check.cases.cost import Estimate
from m3check.cases.families import Family
from m3check.types import Case

if TYPE_CHECKING:
    from torch import Tensor

READS = frozenset({"kv_heads", "gqa", "head_dim", "dtype", "cache_dtype", "layout", "fill", "seed"})
FILLS = ("gauss", "integer", "wide")
DTYPES = ("fp8_e4m3fn", "fp8_e4m3fnuz")
ROW = 4e-3
"""Interpreted seconds of one query and 128 tokens, all heads of 128 channels together."""


def complaint(case: Case) -> str | None:
    """Shared keys, e4m3 on both sides, channels that a tile can have."""
    if case.kv_heads != 1:
        return f"index keys are one head: h=1, got {case.kv_heads}"
    if case.head_dim < 16 or case.head_dim & (case.head_dim - 1):
        return f"d is a power of two, at least 16, got {case.head_dim}"
    if case.dtype not in DTYPES or case.cache_dtype != case.dtype:
        return f"queries and keys have one dtype, {' or '.join(DTYPES)}; got {case.dtype} and {case.cache_dtype}"
    if case.fill not in FILLS:
        return f"{case.op} has no fill={case.fill}; known here: {', '.join(FILLS)}"
    if case.layout == "nhd":
        return "layout=nhd orders the heads of a cache, and index keys are one head; known here: hnd, pool"
    return None


def make(case: Case, draw: Callable[..., Tensor], device: Any) -> Mapping[str, Any]:
    """idx_q [T, H, D], idx_k [N, D], and in `more` key_scale [N] and weights [T, H]."""
    import torch

    from m3check.cases.ident import case_id
    from m3check.cases.stream import key

    steps = 3 << 18  # odd multiples of 2^-20 from a half to two
    step = (torch.arange(case.total_tokens, device=device) * 611953 + key(f"{case_id(case)}#key_scale") % steps) % steps
    return {
        "idx_q": draw("idx_q", (case.total_queries, case.heads, case.head_dim), case.dtype),
        "idx_k": draw("idx_k", (case.total_tokens, case.head_dim), case.cache_dtype),
        "more": {
            "key_scale": ((1 << 19) + 1 + 2 * step).float() / float(1 << 20),
            "weights": draw("weights", (case.total_queries, case.heads), "fp32"),
        },
    }


def estimate(case: Case) -> Estimate:
    """By tiles of 128 tokens; on a device by the reference's products."""
    cells = case.total_queries * (case.context if case.op == "paged_mqa_logits" else case.total_tokens)
    products = case.total_queries * case.heads * case.context * case.head_dim
    return Estimate(0.1 + ROW * cells / 128, 0.05 + products * 1e-12)


FAMILY = Family(reads={"mqa_logits": READS, "paged_mqa_logits": READS}, complaint=complaint, make=make, estimate=estimate)
