"""The words of m3check as data: what a case, a kernel, a profile, a finding, a result and a record are.

Everything here is frozen and knows nothing of torch at import time, so that `m3check list`, `show` and
`compare` answer at once on a machine that has neither torch nor a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCK = 128
"""Tokens in one sparse block, which is also one KV page."""

ROPE = 64
"""Channels of a latent key that carry its position, and are no part of its value."""

INIT_SCORE = 1e30
"""What a forced init block's score cell holds in kernels that force inside the scores."""

LOCAL_SCORE = 1e29
"""Likewise for a forced local block; a block that is both holds this one."""


def blocks(tokens: int) -> int:
    """How many 128-token blocks hold `tokens` tokens (0 for none, or for a negative length)."""
    return max(0, -(-tokens // BLOCK))


def skipped(token: int) -> bool:
    """Whether a query token of an insertion into a cache has no slot there, as padded tokens have none: every fifth."""
    return token % 5 == 3


class Status(StrEnum):
    """What became of a finding or of a result."""

    PASSED = "passed"
    FAILED = "failed"
    KNOWN = "known"  # failed, and the ledger says so
    NOTED = "noted"  # a finding only: breaks the contract where the provider promises nothing
    MISTRUSTED = "mistrusted"  # agreed, but could not have failed
    INCONCLUSIVE = "inconclusive"  # what the case claims to see cannot be told from rounding
    SKIPPED = "skipped"
    ERROR = "error"
    CRASHED = "crashed"
    TIMEOUT = "timeout"


RED = frozenset({Status.FAILED, Status.ERROR, Status.CRASHED, Status.TIMEOUT})
"""Statuses that make the exit code 1."""

STRICTLY_RED = frozenset({Status.NOTED, Status.MISTRUSTED, Status.INCONCLUSIVE})
"""Statuses that `--strict` makes red as well."""

ODD_SCORES = frozenset({"nan", "mostly_nan", "infinite", "negative_zero", "huge"})
"""Rows of scores out of the ordinary: `nan` where numbers enough to fill the list are left, `mostly_nan` where they are
not, `huge` where a score is 1e29 or more and so outranks forcing."""

Evidence = Literal["device", "interpreted", "compiled"]
Phase = Literal["prefill", "decode", "mixed"]


@dataclass(frozen=True)
class Op:
    """One mathematical operation (or a chain of them) that providers implement."""

    name: str
    phase: Phase
    outputs: tuple[str, ...]  # of "score" [H, T, K], "ids" [H, T, topk], "out" [T, Hq, D]
    summary: str
    chain: tuple[str, ...] = ()  # the ops that a chain runs, in order
    on_ids: str = ""  # the op whose reference judges further outputs on the kernel's own ids, where it gives ids
    family: str = "sparse"  # the ops that share inputs, fields of Case and calling conventions (CONTRIBUTING: an op family)


OPS: Mapping[str, Op] = {
    op.name: op
    for op in (
        Op("index_score", "prefill", ("score",), "max of q·k over each visible 128-token block"),
        Op("index_topk", "prefill", ("ids",), "the blocks each query attends to: forced init and local, then by score"),
        Op("index_decode_score", "decode", ("score",), "block scores of the last query_len tokens of each request"),
        Op("index_decode", "decode", ("ids",), "decode block scores and their selection"),
        Op("sparse_attn", "prefill", ("out",), "causal softmax attention over the listed blocks"),
        Op("sparse_attn_decode", "decode", ("out",), "the same for the last query_len tokens of each request"),
        Op(
            "prefill",
            "prefill",
            ("score", "ids", "out"),
            "score, select, attend",
            ("index_score", "index_topk", "sparse_attn"),
        ),
        Op("decode", "decode", ("ids", "out"), "score and select, attend", ("index_decode", "sparse_attn_decode")),
        Op("mqa_logits", "prefill", ("logits",), "fp8 indexer logits: Σ weight · relu(q·k) over heads", family="logits"),
        Op("paged_mqa_logits", "decode", ("logits",), "the same out of pages of keys, then scales", family="logits"),
        Op("mla_sparse", "prefill", ("out", "lse"), "attention to listed tokens of a latent cache", family="latent"),
        Op(
            "sparse_pa_table",
            "prefill",
            ("pages", "context"),
            "the 16-token pages of listed blocks, for a paged attention",
            family="amd",
        ),
        Op(
            "sparse_pa_table_decode",
            "decode",
            ("pages", "context"),
            "the same for the last query_len tokens of each request",
            family="amd",
        ),
        Op(
            "index_decode_table",
            "decode",
            ("ids", "pages", "context", "counter"),
            "index_decode that writes the pages as well",
            on_ids="sparse_pa_table_decode",
            family="amd",
        ),
        Op("index_decode_cp", "decode", ("ids",), "index_decode by several processes that share the blocks", family="amd"),
        Op("index_topk_cp", "decode", ("ids",), "selection by several processes: keys gathered and merged", family="amd"),
        Op("index_insert", "prefill", ("index_keys",), "index keys written into their slots of a cache", family="amd"),
        Op("page16_rebase", "prefill", ("slots", "blocks"), "slots and page ids where a page has 16 tokens", family="amd"),
        Op(
            "indexer",
            "mixed",
            ("ids", "out"),
            "a mixed batch through one layer: metadata, decoded and prefilled rows in one id buffer, attention reading it",
            ("index_decode", "index_score", "index_topk", "sparse_attn_decode", "sparse_attn"),
            family="indexer",
        ),
        Op(
            "qknorm_rope_insert",
            "prefill",
            ("q", "q_codes", "k", "idx_q", "idx_k", "cached_k", "cached_v", "cached_idx_k"),
            "norm and rotate fresh queries and keys, insert keys and values into the caches",
            family="insert",
        ),
    )
}

SPARSE: Mapping[str, Op] = {name: op for name, op in OPS.items() if op.family == "sparse"}
"""The ops of block-sparse attention. What only makes sense of blocks, lists of blocks and chains goes over these."""

DTYPES: Mapping[str, str] = {  # the word in ids and reports: the attribute of torch
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
    "fp8_e4m3fn": "float8_e4m3fn",
    "fp8_e4m3fnuz": "float8_e4m3fnuz",
    "fp8_e5m2": "float8_e5m2",
    "fp8_e5m2fnuz": "float8_e5m2fnuz",
}


@dataclass(frozen=True)
class Request:
    """One request of a batch: `query_len` query tokens at the end of `kv_len` visible tokens."""

    index: int
    query_start: int  # its first row among the T query tokens
    query_len: int
    kv_start: int  # its first row among the N logical key/value tokens
    kv_len: int

    @property
    def prefix(self) -> int:
        """Position of the first query; negative where a padded decode row has fewer tokens than queries."""
        return self.kv_len - self.query_len

    @property
    def queries(self) -> slice:
        """Its rows among the T query tokens."""
        return slice(self.query_start, self.query_start + self.query_len)

    @property
    def tokens(self) -> slice:
        """Its rows among the N logical tokens."""
        return slice(self.kv_start, self.kv_start + self.kv_len)

    def position(self, i: int) -> int:
        """Token position of query `i`; it sees tokens 0 … position, none at all (a dead row) when negative."""
        return self.prefix + i

    def visible_blocks(self, i: int) -> int:
        """How many blocks query `i` sees, its own block included; 0 for a dead row."""
        return blocks(self.position(i) + 1)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One point of the problem space. Defaults are MiniMax-M3's own figures, and frozen: an id leaves them out."""

    op: str
    query_lens: tuple[int, ...]
    """Query tokens of each request; decode ops need them all equal."""
    kv_lens: tuple[int, ...]
    """Visible tokens of each request, its queries included; 0 is a padded (dead) row, allowed in decode."""
    kv_heads: int = 4
    """KV heads, which are also the index heads."""
    gqa: int = 16
    """Query heads for each KV head."""
    head_dim: int = 128
    topk: int = 16
    init_blocks: int = 0
    local_blocks: int = 1
    dtype: str = "bf16"
    """Dtype of the queries (and of the attention output, unless it is an fp8 dtype)."""
    cache_dtype: str = "bf16"
    """Dtype of the cache that the op reads: the index cache in index ops, the main cache in attention ops and chains."""
    index_cache_dtype: str = "bf16"
    """Chains only: dtype of the index cache; where it is an fp8 dtype the index queries have it too."""
    scales: str = "none"
    """Dequantisation of an fp8 main cache: `none`, `scalar` or `token` (one for each token and head)."""
    layout: str = "hnd"
    """Memory order of a page: `hnd`, `nhd`, or `pool` (one layer of a pool of several)."""
    ids: str = "full"
    """Id lists given to attention: `full`, `ascending`, `short`, `holes`, `future` (see cases/selections.py)."""
    max_query_len: int = 0
    """Decode: the longest query length that a captured graph provides for; 0 means the batch's own. In a mixed batch
    (`indexer`): the longest query that counts as a decode; 0 means 1."""
    layer: str = "sparse"
    """Of an insert: `sparse`, `dense` (no index branch, nothing inserted) or `skip_index` (an index branch left alone)."""
    queries: str = "out"
    """Of an insert, where queries go: `out` (a buffer), `place` (where they stood), `fp8` (codes alone) or `both`."""
    fill: str = "gauss"
    seed: int = 0

    @property
    def heads(self) -> int:
        """Query heads in all."""
        return self.kv_heads * self.gqa

    @property
    def decodes(self) -> int:
        """Requests of a mixed batch that are decoded: the leading ones as long as the first, if that is a decode length."""
        first = self.query_lens[0]
        if first > max(self.max_query_len, 1):
            return 0
        return next((i for i, length in enumerate(self.query_lens) if length != first), len(self.query_lens))

    @property
    def total_queries(self) -> int:
        """T, the query tokens of the batch."""
        return sum(self.query_lens)

    @property
    def total_tokens(self) -> int:
        """N, the logical key/value tokens of the batch."""
        return sum(self.kv_lens)

    @property
    def context(self) -> int:
        """The longest visible length of the batch."""
        return max(self.kv_lens, default=0)

    @property
    def block_columns(self) -> int:
        """K, the block columns of a logical score tensor."""
        return blocks(self.context)

    def requests(self) -> Iterator[Request]:
        """The batch, request by request, with where each one's rows start."""
        query_start = kv_start = 0
        for index, (query_len, kv_len) in enumerate(zip(self.query_lens, self.kv_lens, strict=True)):
            yield Request(index, query_start, query_len, kv_start, kv_len)
            query_start += query_len
            kv_start += kv_len

    def axes(self) -> dict[str, Any]:
        """The case as the report's `axes`: the words of the design, figures only."""
        return {
            "batch": len(self.kv_lens),
            "context": self.context,
            "query_len": max(self.query_lens, default=0),
            "topk": self.topk,
            "gqa": self.gqa,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "dtype": self.dtype,
            "cache_dtype": self.cache_dtype,
            "index_cache_dtype": self.index_cache_dtype,
            "scales": self.scales,
            "layout": self.layout,
            "ids": self.ids,
            "init_blocks": self.init_blocks,
            "local_blocks": self.local_blocks,
            "max_query_len": self.max_query_len or max(self.query_lens, default=0),
            "fill": self.fill,
            "seed": self.seed,
            **({"layer": self.layer, "queries": self.queries} if self.op == "qknorm_rope_insert" else {}),
        }


@dataclass(frozen=True)
class Inputs:
    """Logical tensors of a case; what an op does not read is None. No page table anywhere.

    T query tokens and N key/value tokens are both request-major (`Case.requests` says where each request starts).
    From the generator, `k` and `v` hold the cache's codes and the scales stand beside them; what references and checks
    read has been through `reference.dequantised`, which applies the scales and leaves None in their place.
    """

    case: Case
    sm_scale: float
    idx_q: Tensor | None = None  # [T, H, D]       query dtype
    idx_k: Tensor | None = None  # [N, D]          cache dtype, one key shared by all index heads
    scores: Tensor | None = None  # [H, T, K]      fp32, the input of index_topk; -inf where not visible
    q: Tensor | None = None  # [T, Hq, D]      query dtype
    k: Tensor | None = None  # [N, Hkv, D]     cache dtype
    v: Tensor | None = None  # [N, Hkv, D]     cache dtype
    k_scale: Tensor | None = None  # [] or [N, Hkv]  fp32
    v_scale: Tensor | None = None  # [] or [N, Hkv]  fp32
    topk_idx: Tensor | None = None  # [H, T, topk]    int32, logical block ids, the input of attention
    more: Mapping[str, Tensor] = field(default_factory=dict)
    """What ops of other families read, by the names that their file in cases/families tells."""

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        held = (self.idx_q, self.q, self.scores, self.topk_idx, *self.more.values())
        return next(tensor for tensor in held if tensor is not None).device


Outputs = Mapping[str, "Tensor"]
"""A kernel's or a reference's results in logical form: `score` [H, T, K], `ids` [H, T, topk], `out` [T, Hq, D]."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What one provider's kernels need and promise. The defaults are what m3check asks of a new kernel."""

    kv_layout: Literal["packed", "split"] = "packed"
    """Main cache: `packed` is [page, Hkv, 128, 2D], `split` is [page, 2, 128, Hkv, D]."""
    id_order: Literal["any", "score", "ascending"] = "any"
    """Order of the selected ids; `score` is descending, forced blocks first."""
    tie_rule: Literal["any", "smaller_id", "larger_id"] = "any"
    """Which of several blocks of equal score is taken."""
    forcing: Literal["init_first", "own_block"] = "init_first"
    """Where init + local > topk: `init_first` may lose the query's own block, `own_block` never does."""
    forced_scores: bool = True
    """Whether `index_decode_score` writes INIT_SCORE / LOCAL_SCORE into forced cells (else the plain score)."""
    dead_rows: Literal["zero", "nan", "any"] = "zero"
    """Attention output of a row that sees no valid block; the contract wants zero, `nan` and `any` promise nothing."""
    dead_ids: Literal["empty", "any"] = "empty"
    """Ids of a padded row: -1 in every slot, or whatever, since nobody reads them."""
    id_lists: frozenset[str] = frozenset({"full", "ascending", "short", "holes", "future", "late", "empty"})
    """Which id lists attention accepts; on others a broken result is `noted`, not `failed`."""
    odd_scores: frozenset[str] = ODD_SCORES
    """On which rows of scores out of the ordinary selection promises what is right."""
    lse: Literal["natural", "base2"] = "natural"
    """Base of the logsumexp that `mla_sparse` gives beside its output."""
    normaliser: Literal["lse", "sum"] = "sum"
    """How the softmax is normalised: exp2(m - lse), or division by the sum."""
    dequantise: Literal["rounded", "folded", "either"] = "either"
    """fp8 with scales: `rounded` computes on RN_query_dtype(code · scale), `folded` on the exact product."""
    queries: str = ""
    """Attention: the dtype that queries, and weights before they meet values, are rounded to; empty: the queries' own."""
    emits: Literal["direct", "rounded", "either"] = "either"
    """fp8 codes that an insert writes: of its fp32 numbers, or of those rounded to the dtype of the keys first."""
    partials: Literal["query", "fp32", "any"] = "any"
    """Dtype of split-K partial outputs; `query` adds a rounding for each split."""
    bitwise: frozenset[str] = frozenset()
    """Further promises: `repeat` (the same bits twice), `far_rows` (query tokens whose offset passes 2^31 elements),
    `far_slots` (listed slots of a latent cache likewise),
    `graph` (a CUDA graph can capture the kernel), `apart` (channels, ids and score columns of any stride), `empty` (a batch
    without queries gives an empty result)."""


@dataclass(frozen=True)
class Kernel:
    """One provider's implementation of one op, loaded and callable with the keywords of its signature."""

    provider: str  # as named on the command line, with the version: vllm==0.33.0
    op: str
    name: str  # the implementation's own name: minimax_m3_index_score
    profile: Profile
    function: Callable[..., Any]
    parts: Mapping[str, Kernel] = field(default_factory=dict)  # a chain's kernels, by op


@dataclass(frozen=True)
class Finding:
    """One judgement of one check, in words that need no knowledge of the check."""

    check: str
    status: Status
    measured: float | None = None
    limit: float | None = None
    where: str = ""
    hint: str = ""


@dataclass(frozen=True)
class Sums:
    """How a kernel added up products on a device."""

    by: str
    """The least precise of the matrix instructions that ran, by operands and fraction bits, or `fp32`."""
    bits: float | None = None
    """Effective bits: -log2 of the largest |score - s| / Σ|q·k| that was seen; None where no scores tell."""


SHADES = "·123456789#"
"""|error| / limit as one character: up to 1, 2, 4, 8 … 512, more."""


def shade(ratio: float) -> str:
    """One character for |error| / limit: `·` within it, a digit for each doubling, `#` beyond 512, `N` for infinite."""
    if math.isinf(ratio) or math.isnan(ratio):
        return "N"
    if ratio <= 1:
        return SHADES[0]
    return SHADES[min(len(SHADES) - 1, 1 + int(math.log2(ratio)))]


@dataclass(frozen=True)
class HeatMap:
    """A picture in characters: |error| / limit as `shade` has it, where `N` is also a list that is wrong.

    Of a selection's blocks: `=` chosen rightly, `-` left out, `+` taken instead, `±` both, `²` listed twice.
    """

    rows: str
    """What a line is: `request, token`, or a kind of head."""
    columns: str
    """What a character is: a kind of head, `block` or `channel`."""
    labels: tuple[str, ...]
    """Of each line; of its first row where it stands for several."""
    cells: tuple[str, ...]
    step: int = 1
    """Columns in one character, which shows their worst."""
    count: int = 1
    """Rows in one line, likewise."""
    of: str = ""
    """The request and token that it shows, where it shows one row only."""


@dataclass(frozen=True)
class Heat:
    """Where an output is wrong: rows × heads, and the worst row in detail."""

    output: str  # score, ids or out
    maps: tuple[HeatMap, ...]


@dataclass(frozen=True)
class Result:
    """One case on one kernel by one kind of evidence."""

    case: str
    op: str
    provider: str
    kernel: str
    evidence: Evidence
    axes: dict[str, Any]
    status: Status
    reason: str = ""
    findings: tuple[Finding, ...] = ()
    seconds: float = 0.0
    repro: str = ""
    sums: Sums | None = None
    """On a device, of an op that is not a chain."""
    heat: Heat | None = None
    """Where a comparison that failed was wrong."""

    def check(self, strict: bool = False) -> None:
        """Raise Mismatch where the result is red, and unittest.SkipTest (which pytest knows) where nothing ran.

        `strict` makes noted, mistrusted and inconclusive red, as `--strict` does.
        """
        __tracebackhide__ = True  # a failing test ends at the line that called this
        if self.status is Status.SKIPPED:
            import unittest

            raise unittest.SkipTest(self.reason)
        red = RED | STRICTLY_RED if strict else RED
        if self.status in red or (strict and any(f.status in red for f in self.findings)):
            raise Mismatch(self)


class Mismatch(AssertionError):
    """A red result; its message says what is wrong, how far off, where, and which line shows it again."""

    def __init__(self, result: Result) -> None:
        self.result = result
        worst = [f for f in result.findings if f.status is Status.FAILED]
        worst = worst or [f for f in result.findings if f.status in STRICTLY_RED]
        told = [f"{f.check}: {_figure(f.measured)} > {_figure(f.limit)} at {f.where} ({f.hint})" for f in worst]
        head = f"{result.status} {result.case} [{result.provider}]"
        super().__init__("\n".join([head, *(told or [result.reason]), result.repro]).strip())


def _figure(value: float | None) -> str:
    return "?" if value is None else f"{value:.3g}"


@dataclass(frozen=True)
class PlanLine:
    """One thing that a run would do: this case on that provider, by this kind of evidence, or the reason why not."""

    case: str
    op: str
    provider: str
    evidence: Evidence
    skip: str | None = None
    invariants: tuple[str, ...] = ()
    """Names of the invariants (m3check/invariants.py) that this case shows on this kernel."""


@dataclass(frozen=True)
class Exit:
    """The exit code of a run and the sentence that explains it."""

    code: int
    reason: str


@dataclass(frozen=True)
class Breach:
    """What makes a run red although no result is: a floor that was not met, a ledger entry that is wrong."""

    sentence: str
    file: str = ""
    """The file that mends it, where there is one."""
    line: int = 0
    """From 1; 0 where it is not known."""


@dataclass(frozen=True)
class Record:
    """One whole run: what report.json holds and all that the renderers read."""

    schema_version: str
    tool: dict[str, str]
    arch: str
    environment: dict[str, Any]
    command: str
    exit: Exit
    summary: dict[str, int]
    results: tuple[Result, ...]


class M3CheckError(Exception):
    """A mistake that the user can mend; its text says what, got, wanted and how. Exit code 4."""
