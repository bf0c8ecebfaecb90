"""How interpreted kernels read and write memory: masks repaired, whole tiles read at once.

`watch()` is the place for checks of addresses: what it registers sees every access before it happens, so that a later
out-of-bounds check needs no other hook.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from triton.runtime import interpreter as base

Builder = base.InterpreterBuilder
Handle = base.TensorHandle
Watcher: TypeAlias = Callable[[Any, Any, int, str], None]

_watchers: list[Watcher] = []
_TILE = 256  # elements; below this Triton's own loop is quicker


def watch(watcher: Watcher) -> None:
    """Call `watcher(addresses uint64, mask bool, bytes of an element, "load" | "store" | "atomic")` before each access."""
    if not _watchers:
        _install_watching()
    _watchers.append(watcher)


def unwatch(watcher: Watcher) -> None:
    """Undo watch()."""
    _watchers.remove(watcher)


def _boolean(mask: Any) -> Any:
    """The mask as an array of bool; block pointers and descriptors hand over plain arrays, others handles."""
    data = mask if isinstance(mask, np.ndarray) else mask.data
    return data if data.dtype == np.bool_ else data.astype(np.bool_)


def repair_masks() -> None:
    """A mask is taken for what it says, whatever type holds it."""
    load, store, rmw = Builder.create_masked_load, Builder.create_masked_store, Builder.create_atomic_rmw

    def create_masked_load(self: Any, ptrs: Any, mask: Any, other: Any, *rest: Any, **named: Any) -> Any:
        return load(self, ptrs, Handle(_boolean(mask), base.tl.int1), other, *rest, **named)

    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        return store(self, ptrs, value, Handle(_boolean(mask), base.tl.int1), *rest, **named)

    def create_atomic_rmw(self: Any, op: Any, ptr: Any, val: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        return rmw(self, op, ptr, val, Handle(_boolean(mask), base.tl.int1), *rest, **named)

    Builder.create_masked_load, Builder.create_masked_store = create_masked_load, create_masked_store
    Builder.create_atomic_rmw = create_atomic_rmw


def _install_watching() -> None:
    load, store = Builder.create_masked_load, Builder.create_masked_store
    rmw, cas = Builder.create_atomic_rmw, Builder.create_atomic_cas

    def tell(ptrs: Any, mask: Any, kind: str) -> None:
        inside = np.ones(ptrs.data.shape, np.bool_) if mask is None else _boolean(mask)
        size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        for watcher in _watchers:
            watcher(ptrs.data, inside, size, kind)

    def create_masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        tell(ptrs, mask, "load")
        return load(self, ptrs, mask, *rest, **named)

    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        tell(ptrs, mask, "store")
        return store(self, ptrs, value, mask, *rest, **named)

    def create_atomic_rmw(self: Any, op: Any, ptr: Any, val: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        tell(ptr, mask, "atomic")
        return rmw(self, op, ptr, val, mask, *rest, **named)

    def create_atomic_cas(self: Any, ptr: Any, *rest: Any, **named: Any) -> Any:
        tell(ptr, None, "atomic")
        return cas(self, ptr, *rest, **named)

    Builder.create_masked_load, Builder.create_masked_store = create_masked_load, create_masked_store
    Builder.create_atomic_rmw, Builder.create_atomic_cas = create_atomic_rmw, create_atomic_cas


class _Memory:
    """Bytes at an address, for numpy to look at."""

    def __init__(self, address: int, count: int, kind: np.dtype[Any]) -> None:
        self.__array_interface__ = {"data": (address, True), "shape": (count,), "typestr": kind.str, "version": 3}


def read_whole_tiles() -> None:
    """A load whose mask is all true gathers with numpy; only the addressed elements are touched, as by Triton's loop."""
    loop = Builder.create_masked_load

    def create_masked_load(self: Any, ptrs: Any, mask: Any, other: Any, *rest: Any, **named: Any) -> Any:
        data = ptrs.data
        inside = _boolean(mask) if data.size >= _TILE else None
        if inside is None or not inside.all():
            return loop(self, ptrs, mask, other, *rest, **named)
        kind = ptrs.get_element_ty()
        numpy_kind = base._get_np_dtype(kind)
        size = numpy_kind.itemsize
        first = data.min()
        offsets = data - first
        if size > 1:
            if np.bitwise_or.reduce(offsets, axis=None) % size:
                return loop(self, ptrs, mask, other, *rest, **named)
            offsets >>= np.uint64(size.bit_length() - 1)
        indices = offsets.view(np.int64)
        memory = np.asarray(_Memory(int(first), int(indices.max()) + 1, numpy_kind))
        return Handle(memory.take(indices), kind)

    Builder.create_masked_load = create_masked_load
