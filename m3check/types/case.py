"""What a case is, which requests it has, and the logical tensors made of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from m3check.types.units import blocks

if TYPE_CHECKING:
    import torch
    from torch import Tensor


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
    rotary_dim: int = 64
    """Of an insert: channels of a head that are rotated."""
    index_heads: int = 0
    """Of an insert: index query heads in a row; 0 means as many as KV heads."""
    eps: str = "1e-6"
    """Of an insert: what is added to the mean square of a head."""
    fill: str = "gauss"
    seed: int = 0

    @property
    def heads(self) -> int:
        """Query heads in all."""
        return self.kv_heads * self.gqa

    @property
    def index_width(self) -> int:
        """Index query heads in a row of an insert; 0 in a dense layer."""
        return 0 if self.layer == "dense" else self.index_heads or self.kv_heads

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
            **(self._of_insert() if self.op == "qknorm_rope_insert" else {}),
        }

    def _of_insert(self) -> dict[str, Any]:
        figures = {"rotary_dim": self.rotary_dim, "index_heads": self.index_width, "eps": self.eps}
        return {"layer": self.layer, "queries": self.queries, **figures}


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
