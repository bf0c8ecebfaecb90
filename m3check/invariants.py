"""What must not change a kernel's result: the list of invariants, and which cases show which.

An invariant needs no reference: it calls the kernel once more with something changed that its result must not depend on.
Every call costs as much as the case itself, so `assign` gives each (invariant, op) to the cheapest cases that can show it.
This file imports no torch; what the entries name is in m3check/checks/invariants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from m3check.types import BLOCK, SPARSE, Case, Evidence

COUNT: Mapping[str, int] = {"smoke": 1, "ci": 3, "full": 4, "production": 0}
"""How many cases of a tier show each (invariant, op)."""

FEW: Mapping[str, int] = {**COUNT, "smoke": 0, "ci": 1, "full": 2}
"""Likewise of the selections of AMD's path, whose interpreted call takes a second: their grids are those of a whole GPU."""

PROMISES = frozenset({"far_rows", "far_slots", "apart", "empty", "warm"})
"""Invariants that a kernel need not hold unless its `Profile.bitwise` names them: a finding is noted otherwise."""

LONG = 30.0
"""Seconds (an estimate, right within a factor of three) that the invariants of one named case may take."""


@dataclass(frozen=True)
class Invariant:
    """One thing that a result must not depend on."""

    name: str
    ops: frozenset[str]
    fits: Callable[[Case], bool]
    """Whether a case can show it."""
    catches: str
    blind: str
    run: str
    """What carries it out: module and function in m3check.checks.invariants."""
    world: Mapping[str, Any] | None = None
    """Fields of `paging.World`, where nothing else changes: such invariants share one call, and part only if it differs."""
    calls: float = 1.0
    """Calls of the kernel (with their judgement) that it takes, for the estimate of its cost."""
    evidence: frozenset[Evidence] = frozenset({"interpreted", "device"})
    tiers: frozenset[str] = frozenset({"smoke", "ci", "full"})
    most: int = max(COUNT.values())
    """Cases of an op that show it, in whatever tier."""


def _live(case: Case) -> int:
    """Requests with a query that sees a token."""
    return sum(q > 0 and kv > 0 for q, kv in zip(case.query_lens, case.kv_lens, strict=True))


def _always(case: Case) -> bool:
    return True


def _caches(case: Case) -> bool:
    """A dense layer inserts nothing."""
    return case.layer != "dense"


def _stored(case: Case) -> bool:
    """A token of ordinary size in both caches."""
    return case.layer == "sparse" and case.fill == "gauss" and case.ids != "skip_all" and case.total_queries > 2


def _own_block_counts(case: Case) -> bool:
    """What a query must not see stands in its own block, of which ids tell something only where it competes for a slot."""
    competes = case.local_blocks == 0 and case.init_blocks < case.topk < case.block_columns
    return case.op not in INDEX & SELECT or competes


def _tails(case: Case) -> bool:
    return _caches(case) and any(n % BLOCK for n in case.kv_lens)


def _pages(case: Case) -> bool:
    return _caches(case) and sum(-(-n // BLOCK) for n in case.kv_lens) > 2


def _several(case: Case) -> bool:
    return _live(case) > 1


def _unlike(case: Case) -> bool:
    lengths = [n for n, q in zip(case.kv_lens, case.query_lens, strict=True) if n and q]
    return len(set(lengths)) > 1


def _heads(case: Case) -> bool:
    return case.kv_heads > 1 or (case.op in LOGITS and case.gqa > 1)


def _draft(case: Case) -> bool:
    """A request with several queries, of which the first sees a token."""
    return any(q > 1 and kv >= q for q, kv in zip(case.query_lens, case.kv_lens, strict=True))


def _live_rows(case: Case) -> bool:
    return _caches(case) and any(kv >= q > 0 for q, kv in zip(case.query_lens, case.kv_lens, strict=True))


def _rows(case: Case) -> bool:
    """Enough rows, or requests of several, that the offset of the last one passes 32 bits and their stride does not."""
    return (len(case.query_lens) if case.op in PAGED else case.total_queries) > 2


def _forced_room(case: Case) -> bool:
    """A block less or more that is forced changes the selection."""
    return case.init_blocks + case.local_blocks < case.topk < case.block_columns


def _more_blocks(case: Case) -> bool:
    return 2 < case.topk < case.block_columns


def _tunable(case: Case) -> bool:
    return case.op in LISTED | LOGITS or _more_blocks(case)


def _telling(case: Case) -> bool:
    """Lists of several ids that every kernel accepts, and values of which each moves the result: probes hold most still."""
    return case.ids in ("full", "ascending") and case.fill in ("gauss", "wide", "integer") and case.topk > 1


def _tiled(case: Case) -> bool:
    """More rows and blocks than the smallest tile of any kernel, so that its loops and grids have several steps."""
    if case.op in INSERT:
        return case.total_queries * case.kv_heads > 4
    if case.op in LOGITS:
        return case.context > 64
    scoring = case.op in ("index_score", "index_decode_score")
    rows = max(case.query_lens, default=0) if scoring else case.total_queries
    wide = case.topk >= 4 if case.op in ATTEND else case.block_columns > 16
    return rows * case.kv_heads > (16 if scoring else 4) and wide


def _long(case: Case) -> bool:
    """More blocks than a selection's smallest tile of 64, which holds topk; or more of one tile to be taken than half."""
    return case.block_columns > 64 > case.topk or 64 >= case.block_columns > case.topk > 32


def _uniform(case: Case) -> bool:
    """A batch that a graph is captured for: all of its requests are decoded, and several of them differ."""
    return case.decodes == len(case.kv_lens) and _unlike(case)


def _both(*tests: Callable[[Case], bool]) -> Callable[[Case], bool]:
    return lambda case: all(test(case) for test in tests)


AMD_DECODE = frozenset({"index_decode_table", "index_decode_cp"})
AMD_GIVEN = frozenset({"index_topk_cp", "index_topk_cp_table"})
AMD_SELECT = AMD_DECODE | AMD_GIVEN
AMD_TABLES = frozenset({"index_decode_table", "index_topk_cp_table"})
"""A table is for one head."""
INDEX = frozenset({"index_score", "index_decode_score", "index_decode"}) | AMD_DECODE
SELECT = frozenset({"index_topk", "index_decode"}) | AMD_SELECT
LISTED = frozenset({"mla_sparse"})
"""Attention to listed tokens: the list is an input, whatever it names, so nothing is known of the future."""
LOGITS = frozenset({"mqa_logits", "paged_mqa_logits"})
PAGED = frozenset({"paged_mqa_logits"})
ATTEND = frozenset({"sparse_attn", "sparse_attn_decode"}) | LISTED
CHAINS = frozenset({"prefill", "decode"})
MIXED = frozenset({"indexer"})
INSERT = frozenset({"qknorm_rope_insert"})
PAGE_TABLES = frozenset({"sparse_pa_table", "sparse_pa_table_decode"})
TABLES = PAGE_TABLES | {"index_insert", "page16_rebase"}
CACHED = INDEX | ATTEND
SINGLE = CACHED | {"index_topk"} | AMD_GIVEN
EVERY = SINGLE | CHAINS
PREFILL = frozenset(name for name, op in SPARSE.items() if op.phase == "prefill")
DECODE = EVERY - PREFILL - LISTED
DEVICE: frozenset[Evidence] = frozenset({"device"})
INTERPRETED: frozenset[Evidence] = frozenset({"interpreted"})

INVARIANTS: tuple[Invariant, ...] = (
    Invariant("poison", EVERY | MIXED | INSERT | LOGITS, _both(_tails, _own_block_counts), "bytes that no live token "
              "owns, whatever they hold", "dead bytes that only move a result within one rounding to the same bits",
              "memory.physical",
              {"poison": "garbage"}),
    Invariant("pages", CACHED | CHAINS | MIXED | INSERT | PAGED | TABLES, _pages, "page ids kept; arithmetic on them",
              "an identity page table in every call (the comparison sees that)", "memory.physical", {"salt": "again"}),
    Invariant("strides", (EVERY | MIXED | INSERT | LOGITS | {"index_insert"}) - {"index_decode_cp"}, _caches, "strides "
              "that are assumed, of dimensions of size 1 too", "column strides of block tables, which are 1 everywhere",
              "memory.physical", {"layout": "other", "odd_strides": True}),
    Invariant("far_pages", (CACHED - LISTED) | INSERT | PAGED | {"index_insert"}, _live_rows, "32-bit products of page id "
              "and stride", "offsets into other tensors", "memory.far_pages"),
    Invariant("far_slots", LISTED, _live_rows, "32-bit products of a listed token's slot and the stride of slots",
              "offsets into other tensors", "memory.far_slots", tiers=frozenset({"ci", "full"})),
    Invariant("far_rows", (SINGLE - AMD_SELECT) | LOGITS | PAGE_TABLES, _rows, "32-bit products of query token and stride, "
              "in queries, ids, scores and outputs; of a key's row and stride in `mqa_logits`", "offsets of heads",
              "memory.far_rows"),
    Invariant("room", INDEX | PAGED | {"decode"}, _live_rows, "lengths beyond the batch's own (max_seq_len, "
              "max_decode_query_len, table width) that enter the result", "limits that are too small", "memory.room"),
    Invariant("longest", frozenset({"index_decode"}), _long, "a chunk of many tiles: a graph captured for a million "
              "tokens gives the first chunk all blocks of a shorter context", "chunks of other sizes", "memory.longest"),
    Invariant("own_buffers", SELECT | LISTED | LOGITS | {"index_decode_score"}, _live_rows, "a result that is wrong where "
              "a kernel itself allocates it", "kernels that need all of their buffers", "memory.own_buffers"),
    Invariant("apart", (SINGLE | LOGITS | {"index_insert"}) - AMD_SELECT, _live_rows, "strides of channels, ids and score "
              "columns, which are 1 elsewhere", "scales and block tables", "memory.channels_apart", evidence=INTERPRETED),
    Invariant("future", (CACHED | CHAINS | LOGITS) - LISTED, _both(_draft, _own_block_counts), "a token after the query's "
              "position enters the result",
              "tokens whose weight underflows", "content.future"),
    Invariant("neighbours", SINGLE | INSERT | LOGITS, _several, "another request's tokens or queries enter the result",
              "one that reads only its neighbour's length", "content.neighbours"),
    Invariant("batch_order", SINGLE | MIXED | INSERT | LOGITS | PAGE_TABLES, _unlike, "state carried from one request to "
              "the next; fixed places in a batch", "one order in which all is right", "batch.order"),
    Invariant("head_order", SINGLE - LISTED - AMD_TABLES | INSERT | LOGITS, _heads, "heads that are treated by their place",
              "gqa lanes within a KV head", "batch.heads"),
    Invariant("alone", EVERY | MIXED | INSERT | LOGITS | PAGE_TABLES, _several, "results that depend on the other "
              "requests", "batches of one", "batch.alone"),
    Invariant("padded", DECODE | LOGITS | {"sparse_pa_table_decode"}, _live_rows, "padded rows (length 0) that change the "
              "rows of others", "what stands in the padded rows", "batch.padded"),
    Invariant("all_padded", DECODE | LOGITS, _live_rows, "what padded rows hold where no row of the batch is live",
              "one length of a batch", "batch.all_padded"),
    Invariant("empty", SINGLE | INSERT | LOGITS | PAGE_TABLES, _always, "a batch without any query: a division by zero, "
              "another shape", "batches with a query", "batch.empty", evidence=INTERPRETED),
    Invariant("chunked", PREFILL | MIXED | {"mqa_logits"} | {"sparse_pa_table"}, _draft, "a prefix taken for queries; "
              "chunk boundaries inside a block", "boundaries at other places", "routes.chunked", calls=2),
    Invariant("verify", DECODE | MIXED | PAGED | {"sparse_pa_table_decode"}, _draft, "draft tokens judged otherwise than "
              "one by one; of a mixed batch, prefilled ones too", "draft lengths not tried", "routes.verify"),
    Invariant("same_as_prefill", frozenset({"index_decode_score", "sparse_attn_decode", "decode"}) | PAGED, _live_rows,
              "decode that answers another question than prefill", "a mistake that both share", "routes.prefill"),
    Invariant("readers", INSERT, _stored, "a reader that multiplies what was stored, told no scale or a scale of 1",
              "scales that a layer loads for its readers", "readers.scale", calls=5),
    Invariant("other_scale", ATTEND, _live_rows, "sm_scale kept from an earlier call", "a first call", "state.sequence",
              calls=2),
    Invariant("other_topk", SELECT, _more_blocks, "topk kept from an earlier call", "a first call", "state.sequence",
              calls=1.5),
    Invariant("other_init", SELECT | {"index_decode_score"}, _forced_room, "init_blocks kept from an earlier call",
              "a first call", "state.sequence", calls=1.5),
    Invariant("other_local", SELECT | {"index_decode_score"}, _forced_room, "local_blocks kept from an earlier call",
              "a first call", "state.sequence", calls=1.5),
    Invariant("steps", MIXED, _several, "ids, lengths or row starts kept from the batch before", "batches of one shape",
              "steps.other", calls=2),
    Invariant("stale", MIXED, _uniform, "lengths that metadata copy, or read on the host: a captured graph keeps them",
              "what `build` itself computes for another batch", "steps.stale"),
    Invariant("repeat", EVERY | INSERT | LOGITS | TABLES, _always, "state between calls; on a device, races",
              "a race that never shows", "state.sequence"),
    Invariant("autotune", SELECT | LISTED | LOGITS, _tunable, "a configuration that is wrong, though another was "
              "chosen here", "kernels without Triton's autotuner", "state.configurations", calls=3, evidence=INTERPRETED,
              tiers=frozenset({"ci", "full"})),
    Invariant("tiles", (SINGLE - AMD_SELECT) | INSERT | LOGITS, _tiled, "loops and grids of several steps, where the "
              "interpreter's tiles take one", "kernels that tell no tile sizes", "state.tiles", calls=3,
              evidence=INTERPRETED),
    Invariant("warm", SINGLE | INSERT | LOGITS | TABLES, _always, "what compiles or is timed in the middle of serving: an "
              "argument that becomes 1 or divisible by 16, a constant that follows the batch", "sizes not tried",
              "state.warm", calls=4, evidence=DEVICE, most=1),
    Invariant("graph", EVERY | INSERT | LOGITS, _unlike, "lengths, tables or pointers frozen when a graph was captured",
              "addresses that change between replays", "launches.graph", calls=4, evidence=DEVICE),
    Invariant("load", EVERY | INSERT | LOGITS, _live_rows, "scratch or metadata shared by launches in flight",
              "a race that 20 launches hide", "launches.load", calls=2, evidence=DEVICE),
    Invariant("dependent_launch", DECODE | INSERT | PAGED, _live_rows, "reads before an earlier kernel has finished",
              "early reads of what is neither a length, an id, a fresh row nor scratch", "launches.dependent", calls=3,
              evidence=DEVICE),
)  # fmt: skip


def fitting(case: Case, evidence: Evidence) -> tuple[str, ...]:
    """Names of all invariants that a case can show."""
    return tuple(i.name for i in INVARIANTS if case.op in i.ops and evidence in i.evidence and i.fits(case))


def affordable(case: Case, evidence: Evidence, seconds: float) -> tuple[str, ...]:
    """Those that fit, where all of them together stay within LONG; else none."""
    names = fitting(case, evidence)
    return names if seconds * sum(entry.calls for entry in chosen(names)) <= LONG else ()


def assign(
    cases: Iterable[tuple[str, Case, float]],
    evidence: Evidence,
    tier: str,
    suits: Callable[[str, Case], bool] = lambda invariant, case: False,
) -> dict[str, tuple[str, ...]]:
    """Case id -> names of the invariants that it shows, for (id, case, seconds) of a tier.

    The cheapest case comes first; a further one has other dtypes or another layout than those before it, where there is
    one. Cases whose result hardly depends on the inputs come last. Those that suit an invariant come before all others.
    """
    by_op: dict[str, list[tuple[float, str, Case]]] = {}
    for name, case, seconds in cases:
        by_op.setdefault(case.op, []).append((seconds + 1e6 * (not _telling(case)), name, case))
    given: dict[str, list[str]] = {}
    for ranked in by_op.values():
        ranked.sort(key=lambda entry: entry[:2])
    for invariant in INVARIANTS:
        if evidence not in invariant.evidence or tier not in invariant.tiers:
            continue
        for op in sorted(invariant.ops & by_op.keys()):
            left = [entry for entry in by_op[op] if invariant.fits(entry[2])]
            left.sort(key=lambda entry, name=invariant.name: not suits(name, entry[2]))  # type: ignore[misc]
            seen: set[tuple[str, ...]] = set()
            for _ in range(shows(invariant, op, tier)):
                if not left:
                    break
                best = next((entry for entry in left if _kind(entry[2]) not in seen), left[0])
                left.remove(best)
                seen.add(_kind(best[2]))
                given.setdefault(best[1], []).append(invariant.name)
    return {name: tuple(names) for name, names in given.items()}


def shows(invariant: Invariant, op: str, tier: str) -> int:
    """How many cases of a tier show an invariant on an op."""
    return min((FEW if op in AMD_SELECT else COUNT)[tier], invariant.most)


def _kind(case: Case) -> tuple[str, ...]:
    return case.dtype, case.cache_dtype, case.index_cache_dtype, case.layout


def chosen(names: Iterable[str]) -> list[Invariant]:
    """The entries of some names, in the list's order."""
    wanted = set(names)
    return [invariant for invariant in INVARIANTS if invariant.name in wanted]
