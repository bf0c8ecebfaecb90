"""Memory misread: pages and strides other than those of the call. The cache is packed as it was, and read back wrongly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from m3check.hypotheses.scene import Scene
from m3check.types import BLOCK, Inputs, blocks

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Memory:
    """The physical tensors that a kernel reads keys and values from."""

    cache: Tensor
    """[pages, 128, D] of index keys, or the main cache in the provider's layout."""
    table: Tensor
    """[R, columns] int32."""


def misread(change: Callable[[Memory], Memory | None]) -> Callable[[Scene], Inputs | None]:
    """The logical inputs that a kernel sees which takes `change(memory)` for the memory of its call."""
    return lambda scene: _read(scene, change, scene.given.case.kv_lens)


def to_the_end(scene: Scene) -> Inputs | None:
    """Every request with its last block read to the end: past its last token stands what the memory of the call holds."""
    return _read(scene, lambda memory: memory, tuple(blocks(n) * BLOCK for n in scene.given.case.kv_lens))


def _read(scene: Scene, change: Callable[[Memory], Memory | None], lengths: Sequence[int]) -> Inputs | None:
    """The cache packed as in the call, then `lengths` tokens of each request read back through changed memory."""
    from m3check import paging

    given, world = scene.given, scene.world
    index = scene.stage == "score"
    if world.far:
        return None
    case = replace(given.case, layout=world.layout) if world.layout else given.case
    device = next(x for x in (given.idx_q, given.q) if x is not None).device
    laid_out = replace(given, case=case)
    salted = replace(given.case, op=world.salt)
    pages = paging.Pages.shuffled(salted, "index" if index else "main", device, world)
    if index:
        cache = paging.pack_index_cache(laid_out, pages, world.poison)
    else:
        cache = paging.pack_main_cache(laid_out, pages, scene.profile.kv_layout, world.poison)
    other = change(Memory(cache, pages.table))
    if other is None:
        return None
    slots = _slots(lengths, other.table.clamp(0, cache.shape[0] - 1))
    if index:
        return replace(given, idx_k=_take(other.cache, slots // BLOCK, slots % BLOCK))
    raw, page, at, dim = _bytes(other.cache), slots // BLOCK, slots % BLOCK, given.case.head_dim
    if scene.profile.kv_layout == "packed":
        rows = raw[page, :, at]
        k, v = rows[..., :dim], rows[..., dim : 2 * dim]
    else:
        k, v = raw[page, 0, at], raw[page, 1, at]
    changed = replace(given, k=k.contiguous().view(cache.dtype), v=v.contiguous().view(cache.dtype))
    if given.k_scale is not None and given.k_scale.dim() == 2:
        scales = [paging.pack_scale(s, case, pages, world.poison) for s in (given.k_scale, given.v_scale)]
        k_scale, v_scale = (None if s is None else s[:, slots].T for s in scales)
        changed = replace(changed, k_scale=k_scale, v_scale=v_scale)
    return changed


def _slots(lengths: Sequence[int], table: Tensor) -> Tensor:
    """Physical slot of the first tokens of each request, int64, by the rows of a table."""
    import torch

    parts = [torch.zeros(0, dtype=torch.int64, device=table.device)]
    for row, length in enumerate(lengths):
        token = torch.arange(length, device=table.device)
        parts.append(table[row, token // BLOCK].long() * BLOCK + token % BLOCK)
    return torch.cat(parts)


def _bytes(tensor: Tensor) -> Tensor:
    import torch

    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def _take(cache: Tensor, page: Tensor, at: Tensor) -> Tensor:
    return _bytes(cache)[page, at].view(cache.dtype)


def pages_halved(memory: Memory) -> Memory:
    """The page is looked up for every second block only."""
    table = memory.table.clone()
    table[:, 1::2] = table[:, ::2][:, : table[:, 1::2].shape[1]]
    return replace(memory, table=table)


def identity_of_batch(memory: Memory) -> Memory:
    """Pages are numbered through the batch: row · columns + block."""
    import torch

    table = memory.table
    pages = torch.arange(table.numel(), dtype=table.dtype, device=table.device) % memory.cache.shape[0]
    return replace(memory, table=pages.view(table.shape))


def identity_of_row(memory: Memory) -> Memory:
    """Page n holds block n, whatever the table says."""
    import torch

    table = memory.table
    pages = torch.arange(table.shape[1], dtype=table.dtype, device=table.device) % memory.cache.shape[0]
    return replace(memory, table=pages.expand(table.shape))


def first_row(memory: Memory) -> Memory | None:
    """Every request reads the pages of the first."""
    table = memory.table
    return replace(memory, table=table[:1].expand(table.shape)) if len(table) > 1 else None


def column_after(memory: Memory) -> Memory:
    """A block reads the page of the next one."""
    return replace(memory, table=memory.table.roll(-1, 1))


def column_before(memory: Memory) -> Memory:
    """A block reads the page of the one before."""
    return replace(memory, table=memory.table.roll(1, 1))


def first_layer(memory: Memory) -> Memory | None:
    """The cache begins where its storage does: layer 0 of a pool."""
    cache = memory.cache
    if not cache.storage_offset():
        return None
    return replace(memory, cache=cache.as_strided(cache.shape, cache.stride(), 0))


def dense(memory: Memory) -> Memory | None:
    """Strides follow from the shape."""
    cache = memory.cache
    strides, step = list[int](), 1
    for size in reversed(cache.shape):
        strides.insert(0, step)
        step *= size
    if tuple(strides) == cache.stride():
        return None
    return replace(memory, cache=cache.as_strided(cache.shape, strides, cache.storage_offset()))
