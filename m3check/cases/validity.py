"""Which cases make sense: every rule refuses with a sentence that says what was got and what would do.

A word that an op does not read must keep its default, so that one problem has one id.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from m3check.cases import families
from m3check.types import DTYPES, OPS, Case, M3CheckError

SCALES = ("none", "scalar", "token")
LAYOUTS = ("hnd", "nhd", "pool")
LAYERS = ("sparse", "dense", "skip_index")
QUERIES = ("out", "place", "fp8", "both")
EPS = tuple(f"1e-{n}" for n in range(1, 10))


def _fills() -> tuple[str, ...]:
    from m3check.cases.fills import FILLS

    return tuple(FILLS)


def _selections() -> tuple[str, ...]:
    from m3check.cases.selections import SELECTIONS

    return (*SELECTIONS, *families.ids())


KNOWN: Mapping[str, Callable[[], tuple[str, ...]]] = {
    "scales": lambda: SCALES,
    "layout": lambda: LAYOUTS,
    "layer": lambda: LAYERS,
    "queries": lambda: QUERIES,
    "eps": lambda: EPS,
    "ids": _selections,
    "fill": _fills,
}

LONGEST = 2**27
"""Tokens of the longest context that the id lists can shuffle: 128 times M3's own."""

_COMMON = frozenset({"kv_heads", "layout", "fill", "seed"})
_KEYS = frozenset({"head_dim", "dtype", "cache_dtype"})
_ATTENTION = _KEYS | {"gqa", "scales", "topk"}
_FORCING = frozenset({"init_blocks", "local_blocks"})

READS: Mapping[str, frozenset[str]] = {  # the fields that a block-sparse op's inputs or its result depend on, lengths apart
    "index_score": _COMMON | _KEYS,
    "index_topk": _COMMON | _FORCING | {"topk"},
    "index_decode_score": _COMMON | _KEYS | _FORCING | {"max_query_len"},
    "index_decode": _COMMON | _KEYS | _FORCING | {"topk", "max_query_len"},
    "sparse_attn": _COMMON | _ATTENTION | {"ids"},
    "sparse_attn_decode": _COMMON | _ATTENTION | {"ids"},
    "prefill": _COMMON | _ATTENTION | _FORCING | {"index_cache_dtype"},
    "decode": _COMMON | _ATTENTION | _FORCING | {"index_cache_dtype", "max_query_len"},
}


def is_fp8(word: str) -> bool:
    """Whether a dtype word names an fp8 dialect."""
    return word.startswith("fp8_")


def complaint(case: Case) -> str | None:
    """Why a case makes no sense, as one sentence; None where it does."""
    if case.op not in OPS:
        return f"unknown op {case.op!r}; known ops: {', '.join(OPS)}"
    for field in ("dtype", "cache_dtype", "index_cache_dtype"):
        if getattr(case, field) not in DTYPES:
            return f"unknown {field} {getattr(case, field)!r}; known: {', '.join(DTYPES)}"
    for field, known in KNOWN.items():
        if getattr(case, field) not in known():
            return f"unknown {field} {getattr(case, field)!r}; known: {', '.join(known())}"
    family = families.of(case.op)
    if family is not None:
        return _numbers(case) or _lengths(case) or _unread(case, family.reads[case.op]) or family.complaint(case)
    if case.ids in families.ids():
        return f"{case.op} has no ids={case.ids}"
    return _numbers(case) or _lengths(case) or _unread(case, READS[case.op]) or _dtypes(case) or _fill(case)


def validate(case: Case) -> None:
    """Raise M3CheckError where a case makes no sense."""
    sentence = complaint(case)
    if sentence is not None:
        from m3check.cases.ident import case_id

        raise M3CheckError(f"case {case_id(case)!r}: {sentence}")


def _numbers(case: Case) -> str | None:
    for field in ("kv_heads", "gqa", "head_dim", "topk"):
        if getattr(case, field) < 1:
            return f"{field} must be at least 1, got {getattr(case, field)}"
    for field in ("init_blocks", "local_blocks", "max_query_len", "index_heads", "seed"):
        if getattr(case, field) < 0:
            return f"{field} must not be negative, got {getattr(case, field)}"
    return None


def _lengths(case: Case) -> str | None:
    q, kv = case.query_lens, case.kv_lens
    if len(q) != len(kv):
        return f"{len(q)} query lengths but {len(kv)} visible lengths; each request needs one of both"
    if not q or min(q) < 0 or min(kv) < 0:
        return "a batch needs at least one request and no negative length"
    if max(kv) > LONGEST:
        return f"a context has at most {LONGEST} tokens, got {max(kv)}"
    if OPS[case.op].phase == "mixed":
        return None  # told by its family
    if OPS[case.op].phase == "decode":
        if len(set(q)) > 1 or q[0] < 1:
            return f"all requests of a decode batch have the same query length, at least 1; got {'+'.join(map(str, q))}"
        if max(kv) == 0:
            return "a decode batch needs at least one request with a visible token"
        if case.max_query_len and case.max_query_len <= q[0]:
            return f"mq={case.max_query_len} must exceed the query length {q[0]} (left out, it is the batch's own)"
        return None
    if sum(q) == 0:
        return "a prefill batch needs at least one query token"
    if OPS[case.op].family == "logits":  # a window may be empty: queries before a request's first token
        return None if max(kv) else "a batch needs at least one visible token"
    for i, (query_len, kv_len) in enumerate(zip(q, kv, strict=True)):
        if kv_len < max(query_len, 1):
            return f"request {i} has {query_len} queries but {kv_len} visible tokens; its queries are among them"
    return None


def _unread(case: Case, reads: frozenset[str]) -> str | None:
    from m3check.cases.ident import DEFAULTS, WORDS

    for word, field in WORDS.items():
        if field in DEFAULTS and field not in reads and getattr(case, field) != DEFAULTS[field]:
            return f"{case.op} does not read {word} ({field}), so it must be left out; got {getattr(case, field)}"
    if case.layout == "nhd" and case.op in READS and not reads_main_cache(case.op):
        return "layout=nhd orders the heads of the main cache, and the index cache has one head; known here: hnd, pool"
    return None


def reads_main_cache(op: str) -> bool:
    """Whether an op attends, alone or at the end of a chain."""
    return op in READS and "gqa" in READS[op]


def _fill(case: Case) -> str | None:
    from m3check.cases.fills import FILLS

    return FILLS[case.fill].complaint(case)


def _dtypes(case: Case) -> str | None:
    if not reads_main_cache(case.op):
        return _operands(case.dtype, case.cache_dtype, "cache")
    if is_fp8(case.dtype):
        return f"attention queries are bf16, fp16 or fp32, got {case.dtype}"
    if not is_fp8(case.cache_dtype):
        if case.cache_dtype != case.dtype:
            return f"a cache that is not fp8 has the queries' dtype {case.dtype}, got {case.cache_dtype}"
        if case.scales != "none":
            return f"scale={case.scales} belongs to an fp8 cache; this one is {case.cache_dtype}"
    if OPS[case.op].chain and not is_fp8(case.index_cache_dtype) and case.index_cache_dtype != case.dtype:
        return f"an index cache that is not fp8 has the queries' dtype {case.dtype}; got icache={case.index_cache_dtype}"
    return None


def _operands(query: str, cache: str, word: str) -> str | None:
    if query == cache:
        return None
    one_fp8 = is_fp8(query) != is_fp8(cache)
    if one_fp8 and {query, cache} & {"bf16", "fp16"}:
        return None
    return f"{word}={cache} and dtype={query} do not multiply: they are equal, or one is fp8 and the other bf16 or fp16"
