"""The tensors of an insert: rows of a fused projection that are worked on in place, and caches with slots.

What a kernel may write is told cell by cell: the heads of a row that are rewritten, and of a cache the slots of the batch.
All else is watched: heads that are left as they are, every other slot, a page before slot 0 and one behind the last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from m3check import paging
from m3check.kernels.calls.family import Physical, Taken
from m3check.paging import Pages, World
from m3check.types import BLOCK, Case, Inputs

NONE = (
    "index_q_norm_weight", "index_k_norm_weight", "slot_mapping", "index_slot_mapping", "kv_cache", "index_cache", "q_out",
    "index_q_out", "q_fp8_out",
)  # fmt: skip
"""What is None in some layers."""


class Cells(paging.Guard):
    """A watched tensor of which a kernel may write some cells only."""

    def __init__(
        self, name: str, backing: Tensor, view: Tensor, near: Tensor, mine: Tensor, words: Callable[[tuple[int, ...]], str]
    ) -> None:
        """`mine` is bool like `near`, the part of `view` that lies in `backing`; `words` says where a cell of `view` is."""
        owned = torch.zeros(backing.shape, dtype=torch.bool, device=backing.device)
        start = int(near.storage_offset()) - int(backing.storage_offset())
        owned.as_strided(near.shape, near.stride(), start)[...] = mine
        super().__init__(name, backing, view, owned)
        self._words = words

    def overwritten(self) -> list[int]:
        """Flat positions of foreign cells that changed, relative to the view's first element."""
        start = int(self._backing.storage_offset())
        return [start + i for i in super().overwritten()]

    def place(self, position: int) -> str:
        """The cell at a flat position from the view's first element; empty where it is beside the view."""
        index = [0] * self.view.dim()
        for dim in sorted(range(self.view.dim()), key=lambda d: -int(self.view.stride()[d])):
            index[dim], position = divmod(position, self.view.stride(dim))
        inside = position == 0 and all(0 <= i < n for i, n in zip(index, self.view.shape, strict=True))
        return self._words(tuple(index)) if inside else ""


class Slots(Cells):
    """A cache [pages, 128, D] or [pages, Hkv, 128, 2D] of which the slots of one batch may be written."""

    def __init__(self, name: str, backing: Tensor, cache: Tensor, slots: Tensor, pages: Pages) -> None:
        near = cache[pages.first :]
        mine = torch.zeros(near.shape, dtype=torch.bool, device=cache.device)
        live = slots[slots >= 0]
        mine.movedim(-2, 1)[live // BLOCK - pages.first, live % BLOCK] = True

        def words(at: tuple[int, ...]) -> str:
            head = f", kv head {at[1]}" if len(at) > 3 else ""
            return f"slot {at[0] * BLOCK + at[-2]} (page {at[0]}){head}, channel {at[-1]}, which no token of the batch has"

        super().__init__(name, backing, cache, near, mine, words)
        self.slots = slots

    def rows(self) -> Tensor:
        """What stands at each token's slot, [T, Hkv or 1, channels]; zero where it has none."""
        slot = self.slots.clamp(min=0)
        raw = paging.words(self.view).movedim(-2, 1)  # the token's dimension beside the page's
        found = raw[slot // BLOCK, slot % BLOCK]
        found = found if found.dim() == 3 else found[:, None]
        return found.mul((self.slots >= 0)[:, None, None].to(found.dtype)).view(self.view.dtype)


def widths(case: Case) -> dict[str, int]:
    """How many heads of each kind stand in a row of qkv."""
    index = {"idx_q": case.index_width, "idx_k": 1} if case.layer != "dense" else {}
    return {"q": case.heads, "k": case.kv_heads, "v": case.kv_heads, **index}


def parts(case: Case) -> dict[str, slice]:
    """The columns of qkv [T, heads, D] that each kind of head has."""
    found, start = {}, 0
    for name, count in widths(case).items():
        found[name] = slice(start, start + count)
        start += count
    return found


def rewritten(case: Case) -> frozenset[str]:
    """The heads of a row that are worked on in their place."""
    names = {"k"}
    if case.queries == "place":
        names.add("q")
    if case.layer == "sparse":
        names.add("idx_k")
        if case.queries == "place" and not case.index_cache_dtype.startswith("fp8"):
            names.add("idx_q")
    return frozenset(names)


def written(case: Case) -> tuple[str, ...]:
    """Every output of a case, by the names of `take`."""
    made = {
        "q": case.queries != "fp8",
        "q_codes": case.queries in ("fp8", "both"),
        "k": True,
        "idx_q": case.layer == "sparse",
        "idx_k": case.layer == "sparse",
        "cached_k": case.layer != "dense",
        "cached_v": case.layer != "dense",
        "cached_idx_k": case.layer == "sparse",
    }
    return tuple(name for name, there in made.items() if there)


def physical(inputs: Inputs, world: World) -> Physical:
    """The tensors of one call. Main and index cache have pages of their own, and only those that fresh tokens come into."""
    more, device = inputs.more, inputs.device
    salt = world.salt or inputs.case.op
    case = replace(inputs.case, layout=world.layout or inputs.case.layout)
    inserts, indexes = case.layer != "dense", case.layer == "sparse"
    short = tuple(r.kv_len - max(r.prefix, 0) // BLOCK * BLOCK for r in case.requests())
    few = replace(case, op=salt, kv_lens=short)  # the same offsets in as few pages as hold the fresh tokens
    guards: dict[str, paging.Guard] = {"qkv": _rows(inputs, case, world)}
    given: dict[str, Any] = {
        "q_norm_weight": more["w_q"].clone(),
        "k_norm_weight": more["w_k"].clone(),
        "cos_sin_cache": more["cos_sin"].clone(),
        "positions": more["positions"].clone(),
        "num_heads": case.heads,
        "num_kv_heads": case.kv_heads,
        "rotary_dim": more["cos_sin"].shape[1],
        "eps": float(more["eps"]),
        "num_index_heads": case.index_width,
        "block_size": BLOCK if inserts else 0,
        "kv_cache_dtype": case.cache_dtype[:8] if inserts and case.cache_dtype.startswith("fp8") else "auto",
        "skip_index_branch": case.layer == "skip_index",
        "q_fp8_scale": float(more["q_scale"]),
    }
    if inserts:
        pages = Pages.shuffled(few, "main", device, world, paging.far_page(few, False) if world.far else 0)
        given["slot_mapping"] = _slots(few, pages, more["kept"])
        guards["kv_cache"] = _main_cache(case, pages, given["slot_mapping"], world)
    if indexes:
        first = paging.far_page(replace(few, layout="hnd"), True) if world.far else 0
        pages = Pages.shuffled(few, "index", device, world, first)
        given["index_slot_mapping"] = _slots(few, pages, more["kept_idx"])
        guards["index_cache"] = _index_cache(case, pages, given["index_slot_mapping"], world)
        given["index_q_norm_weight"] = more["w_idx_q"].clone()
        given["index_k_norm_weight"] = more["w_idx_k"].clone()

    def buffer(name: str, heads: int, output: str) -> None:
        shape, dtype = [case.total_queries, heads * case.head_dim], paging.stored(case)[output]
        guards[name] = paging.guarded(name, shape, paging.poison_value(dtype, world.poison), dtype, device)

    if case.queries in ("out", "both"):
        buffer("q_out", case.heads, "q")
    if case.queries in ("fp8", "both"):
        buffer("q_fp8_out", case.heads, "q_codes")
    if indexes and "idx_q" not in rewritten(case):
        buffer("index_q_out", case.index_width, "idx_q")
    given |= {name: None for name in NONE if name not in given and name not in guards}
    return Physical(given, lambda wanted: {name: guard for name, guard in guards.items() if name in wanted})


def _rows(inputs: Inputs, case: Case, world: World) -> Cells:
    """qkv [T, heads · D]; all heads that are not rewritten are watched.

    Those of an index branch that is left alone hold a number where other memory holds NaN, which would hide their norm.
    """
    dtype, columns = inputs.more["x_q"].dtype, parts(case)
    tokens, heads = case.total_queries, sum(widths(case).values())
    poison = paging.poison_value(dtype, "garbage" if world.poison == "nan" else "nan")
    backing = paging.filled([tokens * heads * case.head_dim + 2 * paging.MARGIN], poison, dtype, inputs.device)
    view = backing[paging.MARGIN : -paging.MARGIN].view(tokens, heads, case.head_dim)
    mine = torch.zeros(view.shape, dtype=torch.bool, device=inputs.device)
    for name, place in columns.items():
        mine[:, place] = name in rewritten(case)
        if (name != "idx_q" and name != "idx_k") or case.layer == "sparse":
            view[:, place] = inputs.more[f"x_{name}"]

    def words(at: tuple[int, ...]) -> str:
        head, channel = divmod(at[1], case.head_dim)
        name = next(name for name, place in columns.items() if place.start <= head < place.stop)
        return f"{name} head {head - columns[name].start}, channel {channel} of token {at[0]}, which is to be left as it is"

    rows = view.view(tokens, heads * case.head_dim)
    return Cells("qkv", backing, rows, rows, mine.view(rows.shape), words)


def _slots(few: Case, pages: Pages, kept: Tensor) -> Tensor:
    """Slot [T] int64 of each fresh token, -1 where it is not kept."""
    every, starts = pages.slots(few), [0]
    for n in few.kv_lens:
        starts.append(starts[-1] + n)
    ends = zip(few.query_lens, starts[1:], strict=True)
    fresh = [torch.arange(end - query_len, end, device=every.device) for query_len, end in ends]
    return every[torch.cat(fresh)].where(kept, -1)


def _main_cache(case: Case, pages: Pages, slots: Tensor, world: World) -> Slots:
    dtype = paging.stored(case)["cached_k"]
    layers = paging.POOL_LAYERS if case.layout == "pool" else 1
    inner = [BLOCK, case.kv_heads] if case.layout == "nhd" else [case.kv_heads, BLOCK]
    storage, backing = paging.watched_pages([layers, *inner, 2 * case.head_dim], pages, world.poison, dtype)
    cache = storage[:, layers // 2]
    return Slots("kv_cache", backing, cache.transpose(1, 2) if case.layout == "nhd" else cache, slots, pages)


def _index_cache(case: Case, pages: Pages, slots: Tensor, world: World) -> Slots:
    dtype = paging.stored(case)["cached_idx_k"]
    storage, backing = paging.watched_pages([BLOCK, case.head_dim], pages, world.poison, dtype)
    return Slots("index_cache", backing, storage, slots, pages)


def take(case: Case, buffers: Mapping[str, Any]) -> Taken:
    """`q`, `q_codes`, `k`, `idx_q`, `idx_k` [T, heads, D] where they belong, and of the caches what stands at the batch's
    slots as `cached_k`, `cached_v`, `cached_idx_k`, zero for tokens without one. fp8 codes come as what they mean, in fp32.
    """
    found: dict[str, Tensor] = {}
    columns = parts(case)

    def heads(name: str) -> Tensor:
        rows: Tensor = buffers[name].view
        return rows.view(len(rows), rows.shape[1] // case.head_dim, case.head_dim)

    for name in rewritten(case):
        found[name] = heads("qkv")[:, columns[name]]
    for name, keyword in (("q", "q_out"), ("q_codes", "q_fp8_out"), ("idx_q", "index_q_out")):
        if keyword in buffers:
            found[name] = heads(keyword)
    if "kv_cache" in buffers:
        found["cached_k"], found["cached_v"] = buffers["kv_cache"].rows().split(case.head_dim, dim=-1)
    if "index_cache" in buffers:
        found["cached_idx_k"] = buffers["index_cache"].rows()
    return Taken({name: (x.float() if x.element_size() == 1 else x).clone() for name, x in found.items()})
