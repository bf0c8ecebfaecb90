"""What SGLang's wrappers cannot run, told before they are called."""

from __future__ import annotations

from m3check.arch import Arch
from m3check.kernels.provider import cannot_compile, index_dtypes
from m3check.kernels.sglang.reading import FUSED, Files, Reading
from m3check.types import Case, Evidence, blocks


def refusal(found: Reading, files: Files, arch: Arch, evidence: Evidence, op: str, case: Case) -> str | None:
    """Why the wrapper of an op (never a chain) cannot run a case; None where it can."""
    name, fused = files[op][1], files is FUSED
    if op == "index_decode_cp":
        sentence = _shared_refusal(case)
        if sentence:
            return f"{name} {sentence}"
    if (op in ("index_score", "index_topk") or (fused and op == "sparse_attn")) and case.head_dim > 256:
        return f"{name} takes a head_dim of at most 256, got {case.head_dim}"
    if op == "index_topk" and case.init_blocks + case.local_blocks > case.topk:
        forced = f"{case.init_blocks} + {case.local_blocks}"
        return f"{name} takes no more forced blocks than topk, got {forced} of {case.topk}"
    if fused and op.startswith("sparse_attn"):
        most = max(map(blocks, case.kv_lens), default=0)
        if case.topk < most or case.ids not in ("full", "ascending"):
            listed = f"{case.topk} of {most}" if case.topk < most else f"ids={case.ids}"
            return f"{name} attends to every block, so lists must name them all; got {listed}"
    if op == "sparse_attn" and not fused and case.gqa > 128:
        return f"{name} takes at most 128 query heads for a KV head, got {case.gqa}"
    if op.startswith("sparse_attn"):
        if case.scales == "token":
            return f"{name} takes one k_scale and one v_scale, none for each token"
        if case.scales != "none" and "k_scale" not in found.parameters[name]:
            return f"{name} takes no k_scale and v_scale, so it cannot read a scaled cache"
    if op == "index_topk":
        return cannot_compile(case, arch, evidence)
    fp8 = found.fp8_index or not (fused or op.startswith("index"))
    return _dtypes(found, name, op, case, fp8) or cannot_compile(case, arch, evidence)


def _shared_refusal(case: Case) -> str | None:
    """What the indexer of several processes does not take: it deals out one index head to each."""
    if case.head_dim != 128:
        return f"takes a head_dim of 128, got {case.head_dim}"
    if case.topk < 16 or case.topk & (case.topk - 1):
        return f"takes a topk of 16 or a larger power of two (rows of up to 16 blocks are not scored), got {case.topk}"
    if case.kv_heads not in (2, 4, 8, 16):
        return f"runs in as many processes as there are index heads, 2, 4, 8 or 16, got {case.kv_heads}"
    return None


def _dtypes(found: Reading, name: str, op: str, case: Case, fp8: bool) -> str | None:
    """Queries and cache of dtypes that a wrapper refuses; `fp8` is whether it takes such a cache at all."""
    index = op.startswith("index")
    queries, cache = index_dtypes(case) if index else (case.dtype, case.cache_dtype)
    plain = ("bf16", "fp16")
    if queries.startswith("fp8"):
        if not index:
            return f"{name} rounds weights to fp8 where queries are fp8, which is another sum than the contract's"
        if queries == cache == "fp8_e4m3fn" and found.fp8_queries:
            return None
        wanted = "bf16, fp16 or (with such a cache) fp8_e4m3fn" if found.fp8_queries else "bf16 or fp16"
        return f"{name} takes queries of {wanted}, got {queries} with a cache of {cache}"
    if queries not in plain:
        return f"{name} takes queries of bf16 or fp16, got {queries}"
    if cache == queries or (cache in found.caches and fp8):
        return None
    others = f", or of {', '.join(sorted(found.caches))}" if fp8 else ""
    return f"{name} takes a cache of the queries' dtype{others}; got {queries} and {cache}"
