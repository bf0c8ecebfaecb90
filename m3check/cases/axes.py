"""The axes of the problem space: which values a tier tries, which do not go together, and where a case stands on each.

A case is described by a *point*: axis -> value. `build` makes the case of a point, `point` reads the point off any case
(so a proof of coverage needs no memory of how a case came about), and `excluded` says why some values do not meet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from m3check.cases.validity import READS, is_fp8, reads_main_cache
from m3check.types import BLOCK, OPS, Case, blocks

Point = Mapping[str, Any]

_FP8 = ("fp8_e4m3fn", "fp8_e5m2", "fp8_e4m3fnuz", "fp8_e5m2fnuz")
_WIDE = ("bf16", "fp16", "fp32")
_PREFILL = {
    "query_len": (1, 5, 64, 65, 130),
    "reach": ("self", "fewer", "equal", "next", "double", "triple", "many"),
    "mix": ("alike", "ragged", "idle"),
}
_DECODE = {
    "query_len": (1, 2, 3, 4, 8),
    "reach": ("fewer", "equal", "next", "double", "triple", "many"),
    "mix": ("alike", "ragged", "dead"),
}
_FULL: Mapping[str, tuple[Any, ...]] = {
    "batch": (1, 2, 3, 5, 8),
    "edge": (127, 0, 1, "inside"),  # the longest visible length modulo 128
    "kv_heads": (4, 1, 2, 3, 8),
    "gqa": (16, 1, 2, 4, 5, 8),
    "head_dim": (128, 64),
    "topk": (16, 1, 3, 4, 8, 15, 17, 24, 32, 48, 63, 64),
    "init_blocks": (0, 1, 2, 9),
    "local_blocks": (1, 0, 2, 9),
    "index_cache_dtype": (*_WIDE, *_FP8),
    "scales": ("none", "scalar", "token"),
    "ids": ("full", "ascending", "short", "holes", "future"),
    "slack": (False, True),  # whether a graph provides for longer queries than the batch has
    "fill": ("gauss", "integer", "wide", "ties"),
}
FILLS = _FULL["fill"]
"""Fills of every value; the others are probes, with cases of their own."""

_BLOCKS = (1, 2, 5, 17, 33, 66)

# What an interpreter affords: a bitonic top-k of one row takes as long there as a hundred blocks of attention.
_CI: Mapping[str, tuple[Any, ...]] = {
    "batch": (1, 2, 3, 5),
    "topk": (16, 1, 15, 24, 64),
    "init_blocks": (0, 1, 9),
    "local_blocks": (1, 0, 9),
    "gqa": (16, 1, 2, 5, 8),
    "blocks": ("self", 2, 5, 17, 21),
    "reach": ("self", "fewer", "equal", "next", "double", "many"),
}
_FEW_ROWS: Mapping[str, tuple[Any, ...]] = {"batch": (1, 2, 3), "kv_heads": (4, 1, 2), "query_len": (1, 2, 3)}
_CI_OF: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "index_topk": _FEW_ROWS,
    "index_decode": _FEW_ROWS,
    "prefill": {**_FEW_ROWS, "topk": (16, 1, 4, 15), "gqa": (16, 1, 5, 8)},
    "decode": {**_FEW_ROWS, "topk": (16, 1, 4, 15), "gqa": (16, 1, 5, 8)},
    "sparse_attn": {"query_len": (1, 3, 5, 17)},
}


def values(op: str, tier: str) -> dict[str, tuple[Any, ...]]:
    """The axes of an op and the values that a tier (`ci` or `full`) tries on each."""
    reads, phase = READS[op], OPS[op].phase
    found = {"batch": _FULL["batch"], "edge": _FULL["edge"], **(_PREFILL if phase == "prefill" else _DECODE)}
    if "topk" not in reads:
        del found["reach"]
        found["blocks"] = ("self", *_BLOCKS[1:]) if phase == "prefill" else _BLOCKS
    found |= {axis: all_values for axis, all_values in _FULL.items() if axis in reads}
    if "max_query_len" in reads:
        found["slack"] = _FULL["slack"]
    if "dtype" in reads:
        found["dtype"] = _WIDE if reads_main_cache(op) else (*_WIDE, *_FP8)
        found["cache_dtype"] = (*_WIDE, *_FP8)
    found["layout"] = ("hnd", "nhd", "pool") if reads_main_cache(op) else ("hnd", "pool")
    if tier == "ci":
        fewer = {**_CI, **_CI_OF.get(op, {})}
        for axis in found.keys() & fewer.keys():
            found[axis] = tuple(v for v in fewer[axis] if v != "self" or v in found[axis])
        found = {axis: tuple(v for v in vs if not str(v).endswith("fnuz")) for axis, vs in found.items()}
    return found


def often_refused(op: str, axis: str, value: Any) -> bool:
    """Whether many providers or targets refuse a value: a case with it is no evidence about its other values."""
    if str(value).endswith("fnuz"):
        return True  # only gfx942 compiles these
    three_heads = axis == "kv_heads" and value == 3
    return three_heads and op in ("index_decode_score", "index_decode", "decode")  # one tile of all heads: powers of two


def excluded(op: str, at: Point) -> str | None:
    """Why the values of a point, or of a part of one, do not go together; None where they do."""
    get = at.get
    dtype, cache, index_cache = get("dtype"), get("cache_dtype"), get("index_cache_dtype")
    if dtype and cache and dtype != cache:
        if reads_main_cache(op) and not is_fp8(cache):
            return "a cache that is not fp8 has the queries' dtype"
        if not reads_main_cache(op) and (dtype != "bf16" or not is_fp8(cache)):
            return "an index cache has the queries' dtype, or is fp8 beside bf16 queries"
    if dtype and index_cache and dtype != index_cache and not is_fp8(index_cache):
        return "an index cache that is not fp8 has the queries' dtype"
    if cache and index_cache and cache != index_cache and not is_fp8(cache) and not is_fp8(index_cache):
        return "two caches that are not fp8 both have the queries' dtype"
    if cache and get("scales", "none") != "none" and not is_fp8(cache):
        return "scales belong to an fp8 cache"
    batch, mix = get("batch"), get("mix")
    if batch and mix:
        if batch == 1 and mix != "alike":
            return "one request is neither ragged nor has an idle or dead neighbour"
        if batch >= 5 and mix == "alike":
            return "batches of five and more are ragged, which keeps them affordable"
    reach, topk = get("reach"), get("topk")
    if topk and ((reach == "fewer" and topk < 8) or (reach == "equal" and topk < 3)):
        return "so few blocks would not hold the longest queries"
    if topk == 1 and get("ids") in ("short", "holes", "future"):
        return "a list of one id has no room"
    whole = [at[axis] == "self" for axis in ("reach", "blocks") if axis in at]
    if "edge" in at and any(whole) and at["edge"] != "inside":
        return "without a prefix the context is as long as the queries"
    return None


def context_blocks(reach: str, topk: int) -> int:
    """How many blocks the longest request sees."""
    return {
        "fewer": topk // 2,
        "equal": topk,
        "next": topk + 1,
        "double": 2 * topk + 1,
        "triple": 3 * topk + 1,
        "many": 4 * topk + 3,
    }[reach]


def build(op: str, at: Point) -> Case | None:
    """The case of a whole point; None where its lengths cannot be had."""
    whole = at.get("reach", at.get("blocks")) == "self"
    count = 0 if whole else (at["blocks"] if "blocks" in at else context_blocks(at["reach"], at["topk"]))
    query_len, batch, mix = at["query_len"], at["batch"], at["mix"]
    longest = query_len if whole else _length(count, at["edge"])
    if longest < query_len:
        return None
    others = _decode_others if OPS[op].phase == "decode" else _prefill_others
    requests = [(query_len, longest)] + [
        (query_len, longest) if mix == "alike" else others(i, mix, query_len, longest, whole) for i in range(1, batch)
    ]
    turn = (query_len + longest // BLOCK) % batch  # the longest request does not always come first
    requests = requests[turn:] + requests[:turn]
    fields = {axis: at[axis] for axis in at if axis in READS[op]}
    if at.get("slack"):
        fields["max_query_len"] = 2 * query_len
    lengths: dict[str, Any] = {"query_lens": tuple(q for q, _ in requests), "kv_lens": tuple(kv for _, kv in requests)}
    return Case(op=op, **lengths, **fields)


def _length(count: int, edge: Any) -> int:
    """A visible length of `count` blocks whose last one holds 127, 128, 1 or some tokens."""
    last = {127: BLOCK - 1, 0: BLOCK, 1: 1, "inside": 75}[edge]
    return (count - 1) * BLOCK + last


def _prefill_others(i: int, mix: str, query_len: int, longest: int, whole: bool) -> tuple[int, int]:
    count = blocks(longest)
    fewer = (1, (count + 1) // 2, max(1, count - 1), 2)[i % 4]
    kv_len = min(longest, _length(fewer, (0, 1, 127)[i % 3]))
    if mix == "idle" and i == 1:
        return 0, kv_len
    queries = (1, (query_len + 1) // 2, query_len, min(query_len, 3))[i % 4]
    return (queries, queries) if whole else (min(queries, kv_len), kv_len)


def _decode_others(i: int, mix: str, query_len: int, longest: int, whole: bool) -> tuple[int, int]:
    count = blocks(longest)
    if mix == "dead" and i in (1, 2):
        return query_len, (query_len // 2, 0)[(i + query_len // 2) % 2]  # as many rows as not, or all of them, are dead
    kv_len = _length((1, (count + 1) // 2, max(1, count - 1), 2)[i % 4], (0, 1, 127)[i % 3])
    return query_len, min(longest, max(query_len, kv_len))


def point(case: Case) -> dict[str, Any]:
    """Where a case stands on the axes of its op; a value that no tier tries is given as it is."""
    longest = max(case.kv_lens)
    lead = max((q for q, kv in zip(case.query_lens, case.kv_lens, strict=True) if kv == longest), default=0)
    decode, reads = OPS[case.op].phase == "decode", READS[case.op]
    whole = not decode and lead == longest
    at: dict[str, Any] = {
        "batch": len(case.kv_lens),
        "query_len": max(case.query_lens),
        "edge": "inside" if whole or longest % BLOCK not in (127, 0, 1) else longest % BLOCK,
        "mix": _mix(case),
    }
    if "topk" in reads:
        at["reach"] = "self" if whole else reach_of(blocks(longest), case.topk)
    else:
        at["blocks"] = "self" if whole else blocks(longest)
    at |= {axis: getattr(case, axis) for axis in (*_FULL, "dtype", "cache_dtype", "layout") if axis in reads}
    if "max_query_len" in reads:
        at["slack"] = case.max_query_len > 0
    return at


def reach_of(count: int, topk: int) -> str:
    """How a number of visible blocks compares with topk."""
    if count <= topk:
        return "equal" if count == topk else "fewer"
    if count == topk + 1:
        return "next"
    return next((word for word, times in (("double", 3), ("triple", 4)) if count <= times * topk), "many")


def _mix(case: Case) -> str:
    if OPS[case.op].phase == "decode":
        if any(kv < q for q, kv in zip(case.query_lens, case.kv_lens, strict=True)):
            return "dead"
    elif 0 in case.query_lens:
        return "idle"
    return "alike" if len(set(case.kv_lens)) == 1 and len(set(case.query_lens)) == 1 else "ragged"
