"""The pieces that vLLM's path on AMD adds: tables for a paged attention, a selection shared by several processes.

They read the lists, keys and scores of block-sparse attention; a table of pages is for one KV head. `layout=pool` stands
for caches whose keys and values share a block, so that a block spans 16 page ids, `hnd` for planes of their own and 8.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from m3check.cases.cost import CALL, SCORE_CHUNKS, SCORE_STEP, SELECT_ROW, VALUE, Estimate
from m3check.cases.families import Family
from m3check.types import Case, blocks

if TYPE_CHECKING:
    from torch import Tensor

_TABLE = frozenset({"kv_heads", "topk", "ids", "layout", "seed"})
_SELECT = frozenset({"kv_heads", "topk", "init_blocks", "local_blocks", "fill", "seed"})
_INSERT = frozenset({"head_dim", "dtype", "cache_dtype", "layout", "fill", "seed"})
_SCORE = _SELECT | {"head_dim", "dtype", "cache_dtype", "layout", "max_query_len"}

FILLS = ("gauss", "integer", "wide", "ties")


def complaint(case: Case) -> str | None:
    """Why a case makes no sense, as one sentence."""
    if case.op in TABLES and case.kv_heads != 1:
        return f"a table of pages is for one KV head; write h=1, got {case.kv_heads}"
    if case.layout == "nhd":
        return "layout=nhd orders the heads of the main cache, which is not read; known here: hnd, pool"
    known = ("gauss", "wide") if case.op == "index_insert" else (*FILLS, "close", "odd") if case.op in GIVEN else FILLS
    if case.fill not in known:
        return f"fill={case.fill} does not go with {case.op}; known here: {', '.join(known)}"
    if case.dtype != case.cache_dtype and not (case.dtype == "bf16" and case.cache_dtype.startswith("fp8")):
        return f"index queries and keys have one dtype, or are bf16 and fp8; got {case.dtype} and {case.cache_dtype}"
    return None


def make(case: Case, draw: Callable[..., Tensor], device: Any) -> Mapping[str, Any]:
    """Id lists, block scores, or index queries and keys, as the block-sparse ops have them."""
    import torch

    from m3check.cases.ident import case_id
    from m3check.cases.selections import SELECTIONS, visible_blocks
    from m3check.cases.stream import Stream
    from m3check.paging import torch_dtype

    if case.op in ("sparse_pa_table", "sparse_pa_table_decode"):
        ids = SELECTIONS[case.ids](case, Stream(f"{case_id(case)}#ids"))
        return {"topk_idx": torch.from_numpy(ids).to(torch.int32).to(device)}
    heads, queries = case.kv_heads, case.total_queries
    if case.op == "page16_rebase":
        return {"more": {"cached": torch.empty(0, device=device)}}
    if case.op == "index_insert":
        cached = torch.empty(0, dtype=torch_dtype(case.cache_dtype), device=device)
        keys = draw("idx_k", (queries, case.head_dim), case.dtype)
        if case.fill == "wide":  # 2^-12 to 2^13, 6 bits of fraction: fp8 saturates, rounds, meets ties and goes under
            keys = draw("x_idx_k", keys.shape, case.dtype) * draw("x_size", keys.shape, case.dtype)
        return {"more": {"index_k": keys, "cached": cached}}
    if case.op in GIVEN:
        scores = draw("scores", (heads, queries, case.block_columns), "fp32")
        unseen = torch.arange(case.block_columns) >= torch.from_numpy(visible_blocks(case))[:, None]
        return {"scores": scores.masked_fill_(unseen.to(scores.device), float("-inf"))}
    return {
        "idx_q": draw("idx_q", (queries, heads, case.head_dim), case.dtype),
        "idx_k": draw("idx_k", (case.total_tokens, case.head_dim), case.cache_dtype),
    }


def estimate(case: Case) -> Estimate:
    """Seconds; a row of a table costs as much as a row of a selection."""
    rows, ranks = case.total_queries * case.kv_heads, max(2, min(case.kv_heads, 4))
    seconds = CALL + SELECT_ROW * rows * (ranks if "_cp" in case.op else 1)
    if "head_dim" in FAMILY.reads[case.op]:
        seconds += sum(SCORE_CHUNKS + SCORE_STEP * blocks(n) for n in case.kv_lens)
        seconds += case.total_tokens * case.head_dim * VALUE
    return Estimate(seconds, 0.05)


TABLES = frozenset({"sparse_pa_table", "sparse_pa_table_decode", "index_decode_table", "index_topk_cp_table"})
"""Ops that make a table of pages."""

GIVEN = frozenset({"index_topk_cp", "index_topk_cp_table"})
"""Ops that choose among scores which they are given."""

FAMILY = Family(
    reads={
        "sparse_pa_table": _TABLE,
        "sparse_pa_table_decode": _TABLE,
        "index_decode_table": _SCORE,
        "index_decode_cp": _SCORE - {"max_query_len"},
        "index_topk_cp": _SELECT,
        "index_topk_cp_table": _SELECT | {"layout"},
        "index_insert": _INSERT,
        "page16_rebase": frozenset({"seed"}),
    },
    complaint=complaint,
    make=make,
    estimate=estimate,
)
