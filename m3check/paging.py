"""From logical tokens to a provider's physical memory: cache layouts, block tables, poison, canaries.

A kernel never sees logical tensors and a reference never sees a page table; this file is the only bridge. Every byte that
no live token owns holds poison, pages are shuffled, and what a kernel may write stands inside a larger buffer whose other
cells are watched.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from m3check import arena
from m3check.arch import Arithmetic
from m3check.types import BLOCK, DTYPES, Case, Inputs, blocks

Poison = Literal["nan", "garbage"]

GARBAGE = 1.5e4
"""Large and finite in every cache dtype but e4m3, which saturates it to its own largest value."""

IMPOSSIBLE_ID = -7777
"""Prefilled into id buffers: no kernel writes it, so an unwritten slot is seen."""

POOL_LAYERS = 3
MARGIN = 256
"""Watched elements on each side of a buffer; a multiple of 16 bytes in every dtype, so that alignment is kept."""

SPARE_ROWS = 3
"""Rows of an id buffer past the batch's own, as one that was made for the largest batch has them."""

SPARE_PAGES = 4
TABLE_MARGIN = 4
"""int32 columns left of a block table's row: 16 bytes, so that the row keeps the alignment of a fresh one."""


def torch_dtype(word: str) -> torch.dtype:
    """The torch dtype of a dtype word of case ids, e.g. `bf16`."""
    dtype: torch.dtype = getattr(torch, DTYPES[word])
    return dtype


def stored(case: Case) -> dict[str, torch.dtype]:
    """The dtype of each output of `qknorm_rope_insert`."""
    model, cache = torch_dtype(case.dtype), torch_dtype(case.cache_dtype)
    index = torch_dtype(case.index_cache_dtype) if case.index_cache_dtype.startswith("fp8") else model
    fnuz = "fnuz" in case.cache_dtype + case.index_cache_dtype
    codes = torch_dtype("fp8_e4m3fnuz" if fnuz else "fp8_e4m3fn")
    caches = {"cached_k": cache, "cached_v": cache, "cached_idx_k": index}
    index_queries = model if case.queries == "place" and index.itemsize > 1 else index
    return {"q": model, "q_codes": codes, "k": model, "idx_q": index_queries, "idx_k": model, **caches}


def poison_value(dtype: torch.dtype, poison: Poison) -> float:
    """The value that fills memory which no live token owns."""
    if poison == "nan":
        return float("nan")
    return min(GARBAGE, float(torch.finfo(dtype).max))


def filled(shape: Sequence[int], value: float, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """A new tensor of one value; goes through bytes where torch cannot fill an fp8 dtype."""
    if dtype.itemsize == 1 and dtype.is_floating_point:
        code = torch.tensor(value).to(dtype).view(torch.uint8).item()
        return torch.full(tuple(shape), int(code), dtype=torch.uint8, device=device).view(dtype)
    return torch.full(tuple(shape), value, dtype=dtype, device=device)


def words(tensor: Tensor) -> Tensor:
    """A tensor's bits as integers, so that NaN equals itself in comparisons."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.view(integer)


class Guard:
    """A buffer that a kernel may write, inside a larger one whose every other cell must keep its bits."""

    def __init__(self, name: str, backing: Tensor, view: Tensor, owned: Tensor) -> None:
        self.name = name
        self.view = view
        self._backing = backing
        self._before = backing.clone()
        self._owned = owned  # bool, shaped like backing: cells that the kernel may write

    def reset(self) -> None:
        """Put back what the buffer and its surroundings held at first."""
        words(self._backing).copy_(words(self._before))

    def own(self, dim: int, count: int) -> None:
        """Let the kernel write the first `count` entries of one dimension of the view only."""
        rest = self.view.narrow(dim, count, self.view.shape[dim] - count)
        self._owned.as_strided(rest.shape, rest.stride(), rest.storage_offset())[...] = False

    def overwritten(self) -> list[int]:
        """Flat positions of cells outside the view that changed, relative to the view's first element."""
        changed = (words(self._backing) != words(self._before)) & ~self._owned
        return [int(i) - int(self.view.storage_offset()) for i in changed.nonzero().flatten()[:8]]

    def place(self, position: int) -> str:
        """What a foreign cell is, by its flat position from the view's first element; empty where that is not known."""
        return ""


def guarded(
    name: str,
    shape: Sequence[int],
    value: float,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    strided: bool = False,
    spare: int = 0,
) -> Guard:
    """A watched buffer prefilled with `value`; `strided` leaves foreign cells after each innermost row as well.

    A kernel is given `spare` more entries of the last dimension but one than `shape` says, and must not write them.
    """
    *outer, inner = map(int, shape)
    if spare:
        outer[-1] += spare
    width = inner + 16 if strided else inner
    count = width
    for n in outer:
        count *= n
    backing = filled([count + 2 * MARGIN], value, dtype, device)
    view = backing[MARGIN : MARGIN + count].view(*outer, width)[..., :inner]
    owned = torch.zeros(backing.shape, dtype=torch.bool, device=device)
    owned[MARGIN : MARGIN + count].view(*outer, width)[..., : outer[-1] - spare, :inner] = True
    return Guard(name, backing, view, owned)


@dataclass(frozen=True)
class Frozen:
    """An input that a kernel must not write: its storage and a copy of it."""

    name: str
    tensor: Tensor
    before: Tensor

    @classmethod
    def of(cls, name: str, tensor: Tensor, touched: Tensor | None = None) -> Frozen:
        """Watch a tensor's whole storage, cells outside its view included; or only the part `touched` of a vast one."""
        if touched is not None:
            return cls(name, touched, touched.clone())
        whole = torch.tensor([], dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
        return cls(name, whole, whole.clone())

    def changed(self) -> int:
        """How many elements of the storage have other bits than before."""
        return int((words(self.tensor) != words(self.before)).sum())


@dataclass(frozen=True)
class World:
    """The physical choices of one call that must not change its result."""

    poison: Poison = "nan"
    salt: str = ""  # another page order
    layout: str = ""  # another memory order than the case's: hnd, nhd or pool
    odd_strides: bool = False  # dimensions of size 1 have a stride that means nothing
    far: bool = False  # pages so far into their cache that offsets pass 2^31 elements
    far_rows: bool = False  # likewise the rows of queries, id lists, scores and outputs
    max_seq_len: int = 0  # what the graph provides for; 0: the batch's own longest
    max_query_len: int = 0  # likewise; 0: the case's own
    columns: int = 0  # at least so many columns of the block table
    pages: int = 0  # at least so many pages
    own_buffers: bool = False  # a kernel that can allocate its result is given no buffer
    apart: bool = False  # channels, ids and score columns are every second element of their rows
    contiguous: bool = False  # pages in order; no run does so, since it hides mistakes, but a diagnosis may
    earlier: Literal["", "other", "stale", "captured"] = ""  # `indexer`: another batch was served before; or its metadata
    # are used, in a step launched anew or in one that a CUDA graph captured then


@dataclass(frozen=True)
class Territory:
    """What a kernel may do with one tensor of its call: read and write the cells of this view, and no others."""

    name: str
    view: Tensor
    owned: Tensor | None = None
    """Bool over the first dimensions: cells that may be read; None for all. The others belong to nobody."""
    output: bool = False
    """Whether it may be written; then a cell may be read only after it was."""
    fresh: bool = False
    """Whether the kernel that is launched before may still be writing it: a dependent launch must wait first."""
    held: bool = False
    """Whether an output holds something at first, so that it may be read before it is written."""


Misuse = Literal["outside", "unowned", "input", "unwritten", "race", "unordered", "early"]
"""Of an access: beside every tensor; in a page that no request owns; a write into an input; a read of a cell that nothing
wrote; a write where another program of the launch wrote another value; a read of what another program of it wrote; a read,
by a dependent launch that has not waited, of what the launch before it wrote."""


@dataclass(frozen=True)
class Access:
    """One way in which one line of a kernel misused memory. Only an interpreted run can tell."""

    misuse: Misuse
    kind: Literal["load", "store", "atomic"]
    tensor: str
    where: str  # in elements or pages of the tensor
    kernel: str
    program: tuple[int, int, int]  # the first that did it
    line: str  # of the kernel's source: file.py:12
    count: int  # elements, over all programs
    harmless: bool = False  # a read of what nothing wrote, on which the result does not depend


@dataclass
class Observation:
    """What watching a call brought: how many kernels were launched, and each misuse of memory."""

    launches: int = 0
    accesses: list[Access] = field(default_factory=list)


@dataclass
class Served:
    """What is seen of one step of a mixed batch (op `indexer`) beside its results."""

    index: dict[str, Any] = field(default_factory=dict)
    """The indexer's metadata as nested dicts of figures, and (dtype, values) of tensors."""
    main: dict[str, Any] = field(default_factory=dict)
    """Likewise attention's."""
    moved: list[str] = field(default_factory=list)
    """Tensors of them that a captured graph reads and that lay elsewhere for the batch before."""
    waits: list[str] = field(default_factory=list)
    """Reads of device memory by host code, with their source lines."""
    returned: list[tuple[str, list[int], bool, bool] | None] = field(default_factory=list)
    """Of each id list that the indexer returned: part, shape, whether in the id buffer, whether equal to its rows there."""


@dataclass
class Run:
    """One call of a kernel: its results in logical form, and the memory that was watched meanwhile."""

    outputs: dict[str, Tensor]
    guards: list[Guard] = field(default_factory=list)
    frozen: list[Frozen] = field(default_factory=list)
    beyond: dict[str, Tensor] = field(default_factory=dict)
    """Cells that a returned tensor has past the logical shape, by output name."""
    given: dict[str, Tensor] = field(default_factory=dict)
    """What the buffer for an output holds, cut like it, where the kernel returned another tensor."""
    accesses: list[Access] | None = None
    """Every misuse of memory that was seen; None where nobody looked, or no interpreted kernel was launched."""
    arithmetic: Arithmetic | None = None
    """How this call summed; None where that is not known, as in a run put together from several."""
    served: Served | None = None
    """Of a mixed batch."""


@dataclass(frozen=True)
class Pages:
    """Where each logical block lives: shuffled page ids in a table cut out of a wider one.

    Columns past a request's last block, and the cells around the table, name a valid page that holds only poison: a kernel
    that follows them computes something wrong instead of crashing. The row of a padded request names another such page, as
    a scheduler's null page, which may be read.
    """

    table: Tensor  # [R, columns] int32
    count: int  # pages that are used or spare
    first: int = 0  # the lowest id in use; those below are never touched

    @classmethod
    def shuffled(cls, case: Case, salt: str, device: torch.device | str, world: World = World(), first: int = 0) -> Pages:
        """Page ids drawn from the case alone; `salt` makes the index and the main cache differ."""
        owned = sum(blocks(n) for n in case.kv_lens)
        count = max(owned + SPARE_PAGES, world.pages)
        key = int.from_bytes(hashlib.sha256(f"{case!r}/{salt}".encode()).digest()[:8], "little") >> 1
        order = torch.randperm(count, generator=torch.Generator().manual_seed(key)).to(torch.int32) + first
        if world.contiguous:
            order = order.sort().values
        null, poisoned = order[-2:].tolist()
        if poisoned == first:  # page 0 is what kernels read in place of one that is hidden
            null, poisoned = poisoned, null
        columns = max(case.block_columns + 2, world.columns)
        width = -(-(columns + TABLE_MARGIN) // 16) * 16
        wide = torch.full((len(case.kv_lens) + 2, width), poisoned, dtype=torch.int32)
        start = 0
        for row, n in enumerate(case.kv_lens, start=1):
            wide[row, TABLE_MARGIN : TABLE_MARGIN + columns] = poisoned if n else null
            wide[row, TABLE_MARGIN : TABLE_MARGIN + blocks(n)] = order[start : start + blocks(n)]
            start += blocks(n)
        table = wide.to(device)[1:-1, TABLE_MARGIN : TABLE_MARGIN + columns]
        return cls(table, count, first)

    def readable(self, case: Case) -> Tensor:
        """Bool by page id: the pages of the requests, the null page of padded ones, and page 0, which is always there.

        A kernel may well read page 0 in place of a page that is hidden anyway. It may not follow a column of the table past
        a request's last block: what stands there is not defined.
        """
        named = [self.table[row, : max(blocks(n), 1)] for row, n in enumerate(case.kv_lens)]
        mask = torch.zeros(self.first + self.count, dtype=torch.bool, device=self.table.device)
        mask[0] = True
        if named:
            mask[torch.cat(named).long()] = True
        return mask

    def slots(self, case: Case) -> Tensor:
        """Physical slot (page · 128 + offset) of each of the N logical tokens, int64."""
        parts = []
        for request in case.requests():
            token = torch.arange(request.kv_len, device=self.table.device)
            parts.append(self.table[request.index, token // BLOCK].long() * BLOCK + token % BLOCK)
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=self.table.device)


def with_far_rows(tensor: Tensor, dim: int) -> Tensor:
    """A copy whose rows along `dim` lie so far apart that the last one begins past 2^31 elements."""
    return arena.spread(tensor, dim)


def far_page(case: Case, index: bool) -> int:
    """A page id whose page, in the index cache or else the main cache, begins past 2^31 elements."""
    layers = POOL_LAYERS if case.layout == "pool" else 1
    return arena.first_page(layers * BLOCK * case.head_dim * (1 if index else 2 * case.kv_heads))


def pack_index_cache(inputs: Inputs, pages: Pages, poison: Poison) -> Tensor:
    """Index keys [N, D] as the index cache [page, 128, D], poison wherever no token lives, in every second slot negated."""
    keys = inputs.idx_k
    assert keys is not None
    layers = POOL_LAYERS if inputs.case.layout == "pool" else 1
    storage = poisoned_pages([layers, BLOCK, keys.shape[-1]], pages, poison, keys)
    cache = storage[:, layers // 2]
    if poison == "garbage":  # of both signs, since a query may hide one of them from a maximum
        words(cache)[pages.first :, 1::2] ^= {1: 0x80, 2: -0x8000, 4: -0x80000000}[cache.element_size()]
    slots = pages.slots(inputs.case)
    _bytes(cache)[slots // BLOCK, slots % BLOCK] = _bytes(keys)
    return cache


def pack_main_cache(inputs: Inputs, pages: Pages, kv_layout: str, poison: Poison) -> Tensor:
    """Keys and values [N, Hkv, D] as the main cache, in the provider's layout and the case's memory order.

    `packed` gives [page, Hkv, 128, 2D] with keys in the first D channels; `split` gives [page, 2, 128, Hkv, D].
    """
    k, v, case = inputs.k, inputs.v, inputs.case
    assert k is not None
    assert v is not None
    heads, dim = k.shape[1:]
    layers = POOL_LAYERS if case.layout == "pool" else 1
    if kv_layout == "packed":
        # logical view: page, head, token, channel
        order: tuple[int, ...] = (0, 1, 3, 2, 4) if case.layout == "nhd" else (0, 1, 2, 3, 4)
        shape = [pages.count, layers, heads, BLOCK, 2 * dim]
    else:
        # logical view: page, k or v, token, head, channel
        order = (0, 1, 2, 3, 4, 5) if case.layout == "nhd" else (0, 1, 2, 4, 3, 5)
        shape = [pages.count, layers, 2, BLOCK, heads, dim]
    storage = poisoned_pages([shape[axis] for axis in order[1:]], pages, poison, k)
    cache = storage.permute(*(order.index(axis) for axis in range(len(order))))[:, layers // 2]
    slots = pages.slots(case)
    page, offset, raw = slots // BLOCK, slots % BLOCK, _bytes(cache)
    if kv_layout == "packed":
        raw[page, :, offset, :dim] = _bytes(k)
        raw[page, :, offset, dim:] = _bytes(v)
    else:
        raw[page, 0, offset] = _bytes(k)
        raw[page, 1, offset] = _bytes(v)
    return cache


def pack_scale(scale: Tensor | None, case: Case, pages: Pages, poison: Poison) -> Tensor | None:
    """A scale as kernels take it: one element, or [Hkv, pages · 128] by physical slot; poison where no token lives."""
    if scale is None:
        return None
    if scale.dim() == 0:
        return scale.reshape(1).clone()
    packed = _slots(scale.shape[1], pages, poison, scale)
    packed[:, pages.slots(case)] = scale.T
    return packed


def poisoned_pages(shape: list[int], pages: Pages, poison: Poison, like: Tensor) -> Tensor:
    """Poisoned storage [pages, *shape]; where pages are far, those below the first are mapped and never touched."""
    value = poison_value(like.dtype, poison)
    if not pages.first:
        return filled([pages.count, *shape], value, like.dtype, like.device)
    count = pages.first + pages.count
    storage = arena.allocate(count * math.prod(shape), like.dtype, like.device).view(count, *shape)
    _bytes(storage)[pages.first :] = _bytes(filled([pages.count, *shape], value, like.dtype, like.device))
    return storage


def _slots(heads: int, pages: Pages, poison: Poison, like: Tensor) -> Tensor:
    """Poisoned storage [heads, slots] of scales."""
    value = poison_value(like.dtype, poison)
    if not pages.first:
        return filled([heads, pages.count * BLOCK], value, like.dtype, like.device)
    count = (pages.first + pages.count) * BLOCK
    storage = arena.allocate(heads * count, like.dtype, like.device).view(heads, count)
    storage[:, pages.first * BLOCK :] = value
    return storage


def watched_pages(page: list[int], pages: Pages, poison: Poison, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(poisoned storage [pages, *page], flat memory to be watched): a page before the first in use, one after the last.

    Where pages are far, those below are mapped and never touched, and no part of what is watched.
    """
    device = pages.table.device
    near = filled([pages.count + 2, *page], poison_value(dtype, poison), dtype, device)
    if not pages.first:
        return near[1:-1], near.flatten()
    count = pages.first + pages.count + 1
    storage = arena.allocate(count * math.prod(page), dtype, device).view(count, *page)
    _bytes(storage)[pages.first - 1 :] = _bytes(near)
    return storage[:-1], storage[pages.first - 1 :].flatten()


def apart(tensor: Tensor) -> Tensor:
    """A copy whose last dimension has stride 2; NaN, or an id that cannot be, stands between."""
    between = poison_value(tensor.dtype, "nan") if tensor.dtype.is_floating_point else IMPOSSIBLE_ID
    wide = filled([*tensor.shape, 2], between, tensor.dtype, tensor.device)
    _bytes(wide)[..., 0] = _bytes(tensor)
    return wide[..., 0]


def oddly_strided(tensor: Tensor) -> Tensor:
    """The same view, but dimensions of size 1 (not the last) have a stride that means nothing and that no one may use."""
    if tensor.dim() < 2 or not tensor.numel():
        return tensor
    strides = [7919 if tensor.shape[i] == 1 else tensor.stride(i) for i in range(tensor.dim() - 1)]
    return tensor.as_strided(tensor.shape, (*strides, tensor.stride(-1)), tensor.storage_offset())


def lengths(values: Sequence[int], device: torch.device | str) -> Tensor:
    """Scalar metadata as kernels take it: int32."""
    return torch.tensor(list(values), dtype=torch.int32, device=device)


def _bytes(tensor: Tensor) -> Tensor:
    # Indexed assignment is not implemented for fp8 dtypes on every device; bits are copied, not values.
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
