"""Cases of the op `indexer`: mixed batches, decoded requests first, with the tensors of the chains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from m3check.cases.families import Family
from m3check.types import OPS, Case

if TYPE_CHECKING:
    from torch import Tensor

    from m3check.cases.cost import Estimate

READS = frozenset(
    {"kv_heads", "layout", "fill", "seed", "head_dim", "dtype", "cache_dtype", "index_cache_dtype", "gqa", "scales", "topk",
     "init_blocks", "local_blocks", "max_query_len"}
)  # fmt: skip


def complaint(case: Case) -> str | None:
    """A decoded request may have fewer tokens than queries (its rows are dead); a prefilled one has all of them."""
    from m3check.cases.validity import complaint as of_chain

    decodes = case.decodes
    if case.query_lens[0] < 1:
        return "the first request has no query; the batch is told apart by its length"
    if case.max_query_len == 1:
        return "mq=1 is what a batch without drafts has; leave it out"
    if max(case.kv_lens) == 0:
        return "a batch needs at least one request with a visible token"
    for i, (query_len, kv_len) in enumerate(zip(case.query_lens, case.kv_lens, strict=True)):
        if i >= decodes and not 1 <= query_len <= kv_len:
            return f"request {i} is prefilled, but has {query_len} queries and {kv_len} tokens; wanted some of these"
    live = [i for i, kv_len in enumerate(case.kv_lens) if kv_len]
    lengths: dict[str, Any] = {"query_lens": (1,) * len(live), "kv_lens": tuple(case.kv_lens[i] for i in live)}
    return of_chain(replace(case, op="prefill", max_query_len=0, **lengths))


def make(case: Case, draw: Callable[..., Tensor], device: Any) -> Mapping[str, Any]:
    """The tensors of a chain, of all requests."""
    from m3check.cases.generate import scale
    from m3check.cases.ident import case_id
    from m3check.cases.validity import is_fp8

    queries, tokens, heads, dim = case.total_queries, case.total_tokens, case.kv_heads, case.head_dim
    made: dict[str, Any] = {
        "idx_q": draw("idx_q", (queries, heads, dim), case.index_cache_dtype),  # equals dtype, or both are that fp8
        "idx_k": draw("idx_k", (tokens, dim), case.index_cache_dtype),
        "q": draw("q", (queries, case.heads, dim), case.dtype),
        "k": draw("k", (tokens, heads, dim), case.cache_dtype),
        "v": draw("v", (tokens, heads, dim), case.cache_dtype),
    }
    if is_fp8(case.cache_dtype):
        made |= {f"{which}_scale": scale(case, case_id(case), which, device) for which in ("k", "v")}
    return made


def estimate(case: Case) -> Estimate:
    """Both parts, each as the chain of its phase."""
    from m3check.cases.cost import Estimate, case_cost

    n, parts = case.decodes, []
    for op, part in (("decode", slice(0, n)), ("prefill", slice(n, None))):
        if case.query_lens[part]:
            lengths: dict[str, Any] = {"query_lens": case.query_lens[part], "kv_lens": case.kv_lens[part]}
            parts.append(case_cost(replace(case, op=op, max_query_len=0, **lengths)))
    assert OPS[case.op].phase == "mixed"
    return Estimate(sum(part.interpreted for part in parts), sum(part.device for part in parts))


FAMILY = Family({"indexer": READS}, complaint, make, estimate)
