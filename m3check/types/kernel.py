"""What a kernel is, and what it needs and promises."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from m3check.types.units import M3CheckError

ODD_SCORES = frozenset({"nan", "mostly_nan", "infinite", "negative_zero", "huge"})
"""Rows of scores out of the ordinary: `nan` where numbers enough to fill the list are left, `mostly_nan` where they are
not, `huge` where a score is 1e29 or more and so outranks forcing."""


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
    id_lists: frozenset[str] = frozenset({"full", "ascending", "short", "holes", "future", "late", "empty", "beyond"})
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
    `warm` (after its warm-up, or a first call, batches of other sizes compile nothing),
    `graph` (a CUDA graph can capture the kernel), `apart` (channels, ids and score columns of any stride), `empty` (a batch
    without queries gives an empty result)."""

    def __post_init__(self) -> None:
        for name, words in _words().items():
            if (value := getattr(self, name)) not in words:
                raise M3CheckError(f"Profile({name}={value!r}): known are {', '.join(map(repr, words))}")
        for name in ("id_lists", "odd_scores", "bitwise"):
            value = getattr(self, name)
            if isinstance(value, str) or not all(isinstance(word, str) for word in value):  # in a string, parts are `in`
                raise M3CheckError(f"Profile({name}={value!r}): wanted a set of words, such as frozenset({{'short'}})")
            object.__setattr__(self, name, frozenset(value))


@cache
def _words() -> Mapping[str, tuple[str, ...]]:
    """The values of each field of Profile that has a few."""
    kinds = get_type_hints(Profile)
    return {name: get_args(kind) for name, kind in kinds.items() if get_origin(kind) is Literal}


@dataclass(frozen=True)
class Kernel:
    """One provider's implementation of one op, loaded and callable with the keywords of its signature."""

    provider: str  # as named on the command line, with the version: vllm==0.33.0
    op: str
    name: str  # the implementation's own name: minimax_m3_index_score
    profile: Profile
    function: Callable[..., Any]
    parts: Mapping[str, Kernel] = field(default_factory=dict)  # a chain's kernels, by op
    warm_up: Callable[..., Any] | None = None
    """What a server calls once before it serves, with the keywords of a call; other batches then compile nothing."""
    library: bool = False
    """Whether a library multiplies: Triton kernels that it launches besides keep its books and tell nothing of its sums."""
