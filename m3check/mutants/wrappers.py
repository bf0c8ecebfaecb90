"""Wrong kernels made of a right one: each changes what a kernel is given, or what it gave, as a public defect would.

A wrapper takes the kernel and the keywords of its call. It works on every provider, since all have the same keywords.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from m3check.types import BLOCK

if TYPE_CHECKING:
    from torch import Tensor

Keywords = dict[str, Any]
Function = Callable[..., Any]


def given(**changes: Callable[[Keywords], Any]) -> Callable[[Function, Keywords], Any]:
    """A wrapper that replaces keywords, where the call has them, by functions of all keywords."""

    def wrapper(function: Function, keywords: Keywords) -> Any:
        changed = {k: change(keywords) for k, change in changes.items() if keywords.get(k) is not None}
        return function(**{**keywords, **changed})

    return wrapper


def after(change: Callable[[Any, Keywords], None]) -> Callable[[Function, Keywords], Any]:
    """A wrapper that changes the result in place."""

    def wrapper(function: Function, keywords: Keywords) -> Any:
        returned = function(**keywords)
        result = returned if returned is not None else keywords["output"]
        change(result, keywords)
        return returned

    return wrapper


# Scores.


def narrow_scores(function: Function, keywords: Keywords) -> Tensor:
    """The score row is sized by a stale host length of 64 tokens; the rest of the row is what memory held."""
    import torch

    whole = function(**keywords)
    narrow = function(**{**keywords, "max_seq_len": 64})
    stale = torch.full_like(whole, float("nan"))
    columns = min(1, narrow.shape[2])
    stale[..., :columns] = narrow[..., :columns]
    return stale


def shared_over_heads(result: Tensor, keywords: Keywords) -> None:
    """One selection for all index heads: the largest score of any head, or the first head's ids."""
    if result.is_floating_point():
        result.copy_(result.amax(0, keepdim=True).expand_as(result).clone())
    else:
        result.copy_(result[:1].expand_as(result).clone())


def rounded_twice(keywords: Keywords) -> Tensor:
    """Index queries that went through fp8 on their way."""
    import torch

    q: Tensor = keywords["idx_q"]
    return q if q.element_size() == 1 else q.to(torch.float8_e4m3fn).to(q.dtype)


# Inserts.


def normed_over_all_heads(function: Function, keywords: Keywords) -> Any:
    """The norm of index queries is one over all their heads."""
    heads = keywords["num_index_heads"]
    dim, first = keywords["q_norm_weight"].numel(), keywords["num_heads"] + 2 * keywords["num_kv_heads"]
    place = keywords["qkv"].unflatten(1, (-1, dim))[:, first : first + heads]
    power = place.float().square().mean(-1, keepdim=True)
    returned = function(**keywords)
    if heads and not keywords["skip_index_branch"]:
        out = keywords["index_q_out"]
        target = place if out is None else out.unflatten(1, (-1, dim))
        factor = ((power + keywords["eps"]) / (power.mean(1, keepdim=True) + keywords["eps"])).sqrt()
        target.copy_((target.float() * factor).to(target.dtype))
    return returned


def below_the_cache(function: Function, keywords: Keywords) -> Any:
    """A token without a slot is written at slot -1, before the cache."""
    import torch

    returned, cache, slots = function(**keywords), keywords["kv_cache"], keywords["slot_mapping"]
    if cache is not None and bool((slots < 0).any()):
        cell = cache.as_strided((cache.shape[3],), (1,), cache.storage_offset() - cache.stride(2))
        (cell.view(torch.uint8) if cell.element_size() == 1 else cell).fill_(1)
    return returned


def last_page_lost(keywords: Keywords) -> Tensor:
    """Slots of the index cache without those in the highest page."""
    slots: Tensor = keywords["index_slot_mapping"]
    return slots.masked_fill(slots // BLOCK == slots.max() // BLOCK, -1)


def first_layer(name: str) -> Callable[[Keywords], Tensor]:
    """The cache of layer 0 of a pool instead of the layer's own."""

    def change(keywords: Keywords) -> Tensor:
        cache: Tensor = keywords[name]
        return cache.as_strided(cache.shape, cache.stride(), 0)

    return change


def chunk_start_forgotten(keywords: Keywords) -> Tensor:
    """The keys of a chunk's first block that an earlier chunk wrote: lost from the maximum (NaN is ignored by it)."""
    cache: Tensor = keywords["index_kv_cache"].clone()
    raw, code = _raw(cache)
    for request, prefix in enumerate(keywords["prefix_lens"].tolist()):
        if prefix % BLOCK:
            page = int(keywords["block_table"][request, prefix // BLOCK])
            raw[page, : prefix % BLOCK] = code
    return cache


# Selection.


def few_ties(result: Tensor, keywords: Keywords) -> None:
    """A tie buffer of two: more blocks that tie with the last one taken are dropped, and the row is filled up with -1."""
    import torch

    score: Tensor | None = keywords.get("score", keywords.get("score_out"))
    if score is None:
        return
    ids = result[:, : score.shape[1]]
    at = score[:, : ids.shape[1]].gather(2, ids.clamp(min=0, max=score.shape[2] - 1).long())
    used = ids >= 0
    least = torch.where(used, at, float("inf")).amin(2, keepdim=True)
    tied = used & (at == least)
    dropped = tied & (tied.cumsum(2) > 2)
    kept = torch.where(dropped, -1, ids)
    order = (kept < 0).to(torch.int8).argsort(dim=2, stable=True)
    ids.copy_(kept.gather(2, order))


def garbage_fills(result: Tensor, keywords: Keywords) -> None:
    """Unused slots hold the next ids instead of -1: k was not clamped to the number of blocks."""
    import torch

    slots = torch.arange(result.shape[-1], dtype=result.dtype, device=result.device).expand_as(result)
    result.copy_(torch.where(result < 0, slots, result))


def cut_after_sort(function: Function, keywords: Keywords) -> Tensor:
    """The power of two above topk is selected, sorted by id, and cut."""
    import torch

    topk, out = keywords["topk"], keywords.get("out")
    result = function(**{**keywords, "topk": 1 << (topk - 1).bit_length(), "out": None})
    ordered = torch.where(result < 0, 1 << 30, result).sort(2).values[..., :topk]
    ids = torch.where(ordered == 1 << 30, -1, ordered).to(torch.int32)
    if out is None:
        return ids
    out[:, : ids.shape[1]] = ids
    return out  # type: ignore[no-any-return]


def stale_slots(result: Tensor, keywords: Keywords) -> None:
    """The state of the row before survives in a short row."""
    import torch

    for row in range(1, result.shape[1]):
        result[:, row] = torch.where(result[:, row] < 0, result[:, row - 1], result[:, row])


def padding_over_rows(result: Tensor, keywords: Keywords) -> None:
    """Rows of padding are written over the batch's first row."""
    result[:, :1] = -1


def padding_past_rows(result: Tensor, keywords: Keywords) -> None:
    """One row of padding more than there are rows."""
    tokens = keywords["idx_q"].shape[0] if "idx_q" in keywords else keywords["score"].shape[1]
    offset = result.storage_offset() + (result.shape[0] - 1) * result.stride(0) + tokens * result.stride(1)
    result.as_strided((result.shape[2],), (result.stride(2),), offset).fill_(-1)


def hole_first(result: Tensor, keywords: Keywords) -> None:
    """-1 is emitted early in rows that have one."""
    import torch

    short = (result < 0).any(2, keepdim=True) & (result >= 0).any(2, keepdim=True)
    result.copy_(torch.where(short, result.roll(1, 2), result))


# Attention.


def token_major_ids(keywords: Keywords) -> Tensor:
    """Head-major ids read as token-major ones."""
    ids: Tensor = keywords["topk_idx"]
    heads, tokens, topk = ids.shape
    return ids.contiguous().view(tokens, heads, topk).transpose(0, 1)


def repeated_pages(keywords: Keywords) -> Tensor:
    """The page is looked up for every second block only."""
    table: Tensor = keywords["block_table"].clone()
    table[:, 1::2] = table[:, ::2][:, : table[:, 1::2].shape[1]]
    return table


def identity_table(keywords: Keywords) -> Tensor:
    """Page n holds block n, whatever the table says."""
    import torch

    table: Tensor = keywords["block_table"]
    cache: Tensor = keywords["kv_cache"] if "kv_cache" in keywords else keywords["index_kv_cache"]
    pages = torch.arange(table.numel(), dtype=table.dtype, device=table.device) % cache.shape[0]
    return pages.view(table.shape)


def dense_cache(keywords: Keywords) -> Tensor:
    """A cache read as if its pages were dense."""
    cache: Tensor = keywords["kv_cache"]
    strides: list[int] = []
    step = 1
    for size in reversed(cache.shape):
        strides.insert(0, step)
        step *= size
    return cache.as_strided(cache.shape, strides, cache.storage_offset())


def baked_scale() -> Callable[[Function, Keywords], Any]:
    """sm_scale of the first call is used by all later ones."""
    first: list[float] = []

    def change(keywords: Keywords) -> float:
        first.append(keywords["sm_scale"])
        return first[0]

    return given(sm_scale=change)


def mean_scale(name: str) -> Callable[[Keywords], Tensor]:
    """One scale for all tokens where each has its own."""

    def change(keywords: Keywords) -> Tensor:
        scale: Tensor = keywords[name]
        return scale if scale.dim() < 2 else scale.nanmean().expand_as(scale).contiguous()

    return change


def as_fnuz(name: str) -> Callable[[Keywords], Tensor]:
    """e4m3fn codes read as e4m3fnuz."""

    def change(keywords: Keywords) -> Tensor:
        import torch

        cache: Tensor = keywords[name]
        return cache.view(torch.float8_e4m3fnuz) if cache.dtype == torch.float8_e4m3fn else cache

    return change


def as_numbers(name: str, queries: str) -> Callable[[Keywords], Tensor]:
    """fp8 codes taken as the integers 0 … 255."""

    def change(keywords: Keywords) -> Tensor:
        import torch

        cache: Tensor = keywords[name]
        if cache.element_size() > 1:
            return cache
        like = keywords[queries].dtype
        return cache.view(torch.uint8).to(like if like.itemsize > 1 else torch.bfloat16)

    return change


def dead_rows_nan(result: Tensor, keywords: Keywords) -> None:
    """Rows that see no block become NaN, as 0/0 of a merge without a guard."""
    import torch

    query_len = keywords.get("decode_query_len", 0)
    lengths = keywords["seq_lens"].repeat_interleave(query_len)
    row = torch.arange(lengths.shape[0], device=lengths.device) % query_len
    result[lengths - query_len + row < 0] = float("nan")


# Calls.


def first_lengths() -> Callable[[Function, Keywords], Any]:
    """The lengths of a batch of this shape are those of the first call, as if captured."""
    kept: dict[Any, Tensor] = {}

    def change(keywords: Keywords) -> Tensor:
        shape = tuple((k, tuple(v.shape)) for k, v in keywords.items() if hasattr(v, "shape"))
        return kept.setdefault(shape, keywords["seq_lens"].clone())

    return given(seq_lens=change)


def weak_cache_key() -> Callable[[Function, Keywords], Any]:
    """What was compiled for these shapes is used again, with the forcing and the scale of then."""
    kept: dict[Any, Keywords] = {}

    def wrapper(function: Function, keywords: Keywords) -> Any:
        shape = tuple((k, tuple(v.shape)) for k, v in keywords.items() if k in ("idx_q", "q", "score"))
        baked: Keywords = {k: keywords[k] for k in ("init_blocks", "local_blocks", "sm_scale") if k in keywords}
        return function(**{**keywords, **kept.setdefault(shape, baked)})

    return wrapper


def without_prefix(keywords: Keywords) -> Tensor:
    """Verify rows (several queries of a request) see themselves alone."""
    lengths: Tensor = keywords["seq_lens"]
    query_len = keywords["decode_query_len"]
    return lengths if query_len == 1 else lengths.clamp(max=query_len)


def _raw(cache: Tensor) -> tuple[Tensor, Any]:
    """A cache through which NaN can be written, and the NaN."""
    import torch

    if cache.element_size() > 1:
        return cache, float("nan")
    code = 0x80 if "fnuz" in str(cache.dtype) else 0x7F
    return cache.view(torch.uint8), code
