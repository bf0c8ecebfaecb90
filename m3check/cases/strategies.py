"""Any case that makes sense, drawn by hypothesis, the plainest first: the space that `m3check fuzz` searches.

Which values go together is asked of validity.py, so that nothing is told twice. What is drawn first is made small first.
Ops of other families than block-sparse attention have rules of their own; their cases are listed ones, varied.
No number comes out of more than 100: into wider ranges hypothesis mixes constants that it finds in loaded sources, and
the same seed shall give the same cases whatever is loaded.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from hypothesis import assume
from hypothesis import strategies as st

from m3check.cases import families
from m3check.cases.cost import cost
from m3check.cases.ident import DEFAULTS
from m3check.cases.tiers import tier
from m3check.cases.validity import KNOWN, READS, complaint
from m3check.types import BLOCK, DTYPES, OPS, Case

MOST_REQUESTS = 8
MOST_BLOCKS = 40
"""Blocks of a context; a device is given some that are FAR times as long."""

FAR = 32

SECONDS = 0.7
"""What one call may take by the estimate; a case that takes longer is cut down."""

QUERIES = (1, 2, 3, 0, *range(4, 18), 31, 33, 63, 64, 65, 127, 128, 129, 130)
"""Query tokens of one prefill request: few, and what stands beside a tile's edge."""

FIGURES: Mapping[str, tuple[int, ...]] = {  # field of Case: its values, the plainest first
    "topk": tuple(range(1, 65)),
    "kv_heads": tuple(range(1, 9)),
    "gqa": tuple(range(1, 17)),
    "head_dim": (64, 128),
    "init_blocks": tuple(range(10)),
    "local_blocks": tuple(range(10)),
    "rotary_dim": (64, 32, 96, 128, 8),
    "index_heads": tuple(range(9)),
    "seed": tuple(range(100)),
}

SPECIAL = (1, 0, BLOCK - 1)
"""Tokens in the last block of a context, where mistakes live."""


@st.composite
def _tokens(draw: st.DrawFn, far: bool) -> int:
    """A visible length; one token is the plainest."""
    whole = draw(st.integers(0, MOST_BLOCKS))
    if far and draw(st.integers(0, 9)) == 9:
        whole *= FAR
    rest = draw(st.sampled_from(SPECIAL) | st.integers(0, 99) | st.integers(BLOCK - 64, BLOCK - 1))
    return whole * BLOCK + rest


@st.composite
def _lengths(draw: st.DrawFn, op: str, far: bool) -> dict[str, tuple[int, ...]]:
    """Query and visible lengths of a batch."""
    if OPS[op].phase == "decode":
        queries = draw(st.integers(1, 8))
        visible = draw(st.lists(_tokens(far), min_size=1, max_size=MOST_REQUESTS))
        return {"query_lens": (queries,) * len(visible), "kv_lens": tuple(visible)}
    pairs = draw(st.lists(st.tuples(st.sampled_from(QUERIES), _tokens(far)), min_size=1, max_size=MOST_REQUESTS))
    return {"query_lens": tuple(q for q, _ in pairs), "kv_lens": tuple(max(q, kv, 1) for q, kv in pairs)}


@cache
def _dtypes(op: str) -> tuple[dict[str, str], ...]:
    """The dtypes that go together, by the fields that the op reads; bf16 first."""
    fields = [name for name in ("dtype", "cache_dtype", "index_cache_dtype") if name in READS[op]]
    words = itertools.product(DTYPES, repeat=len(fields))
    combinations: Iterator[dict[str, str]] = (dict(zip(fields, each, strict=True)) for each in words)
    plain = Case(op=op, query_lens=(1,), kv_lens=(1,))
    return tuple(each for each in combinations if complaint(replace(plain, **each)) is None)  # type: ignore[arg-type]


def cases(op: str, evidence: str = "interpreted") -> st.SearchStrategy[Case]:
    """Valid cases of one op that can be afforded by this kind of evidence; long contexts want a device."""
    return _composed(op, evidence) if op in READS else _varied(op, evidence)


@st.composite
def _composed(draw: st.DrawFn, op: str, evidence: str) -> Case:
    """A case put together from its figures, then its words."""
    reads = READS[op]
    figures: dict[str, Any] = draw(_lengths(op, evidence == "device"))
    for field, values in FIGURES.items():
        if field in reads and field != "seed":
            figures[field] = draw(st.sampled_from(values))
    if "max_query_len" in reads:
        more = draw(st.integers(0, 8))
        figures["max_query_len"] = figures["query_lens"][0] + more if more else DEFAULTS["max_query_len"]
    case = replace(_afforded(Case(op=op, **figures), evidence), **draw(st.sampled_from(_dtypes(op))))  # type: ignore[arg-type]
    assume(complaint(case) is None)  # a batch of dead rows alone, or without queries
    for field, words in KNOWN.items():
        if field in reads:
            case = draw(st.sampled_from([each for word in words() if complaint(each := _with(case, field, word)) is None]))
    return _with(case, "seed", draw(st.sampled_from(FIGURES["seed"])))


@st.composite
def _varied(draw: st.DrawFn, op: str, evidence: str) -> Case:
    """A listed case with other lengths and with each field changed, where that makes sense and can be afforded."""
    family = families.of(op)
    assert family is not None
    limit = max(SECONDS, 2 * cost(_listed(op, evidence)[0], evidence))

    def sensible(case: Case) -> bool:
        return complaint(case) is None and cost(case, evidence) <= limit

    def fields(case: Case, words: Mapping[str, Any]) -> Case:
        return replace(case, **words)

    case = draw(st.sampled_from(_listed(op, evidence)))
    if draw(st.booleans()):
        longer = fields(case, draw(_lengths(op, evidence == "device")))
        case = longer if sensible(longer) else case
    words = {field: known() for field, known in KNOWN.items()}
    words |= dict.fromkeys(("dtype", "cache_dtype", "index_cache_dtype"), tuple(DTYPES))
    for field, values in {**FIGURES, **words}.items():
        if field in family.reads[op]:
            own = getattr(case, field)
            others = (_with(case, field, value) for value in values if value != own)
            case = draw(st.sampled_from([case, *filter(sensible, others)]))
    return case


@cache
def _listed(op: str, evidence: str) -> tuple[Case, ...]:
    """The cases of an op that are listed and affordable, or the one that takes the least; the cheapest first."""
    found = sorted((case for case in tier("full") if case.op == op), key=lambda case: cost(case, evidence))
    return tuple(case for case in found if cost(case, evidence) <= SECONDS) or tuple(found[:1])


def _afforded(case: Case, evidence: str) -> Case:
    """The case cut down until a call takes SECONDS at most: fewer queries, requests, heads in turn, then shorter."""
    for cut in itertools.cycle((_fewer_queries, _fewer_requests, _fewer_heads, _shorter)):
        if cost(case, evidence) <= SECONDS:
            return case
        case = cut(case)
    raise AssertionError("one query of one head over one token is affordable")


def _fewer_queries(case: Case) -> Case:
    return replace(case, query_lens=tuple((q + 1) // 2 for q in case.query_lens))


def _fewer_requests(case: Case) -> Case:
    keep = max(1, len(case.kv_lens) - 1)
    return replace(case, query_lens=case.query_lens[:keep], kv_lens=case.kv_lens[:keep])


def _fewer_heads(case: Case) -> Case:
    return replace(case, kv_heads=(case.kv_heads + 1) // 2)


def _shorter(case: Case) -> Case:
    if len(case.kv_lens) > 1:
        return case
    return replace(case, kv_lens=tuple(max(q, kv // 2) for q, kv in zip(case.query_lens, case.kv_lens, strict=True)))


def _with(case: Case, field: str, value: Any) -> Case:
    change: dict[str, Any] = {field: value}
    return replace(case, **change)
