"""How interpreted kernels read and write memory: masks repaired, whole tiles read at once.

`watch()` is the place for checks of addresses: what it registers sees every access before it happens, and every launch.
m3check/interpret/addresses.py makes use of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any, TypeAlias

import numpy as np
from triton.runtime import interpreter as base

Builder = base.InterpreterBuilder
Handle = base.TensorHandle
Watcher: TypeAlias = Callable[[Any, Any, int, str, Any], Any]
Launches: TypeAlias = Callable[[str, Mapping[str, Any]], AbstractContextManager[Any]]

_watchers: list[tuple[Watcher, Launches | None]] = []
_TILE = 256  # elements; below this Triton's own loop is quicker
_watching = False


def watch(watcher: Watcher, launches: Launches | None = None) -> None:
    """Call `watcher(addresses uint64, mask bool, element bytes, "load" | "store" | "atomic", values)` before each access.

    `values` is what a store will write, else None. Where the watcher returns an array of bool, the lanes that it marks are
    left out of the access. `launches(name of the kernel, its arguments by name)` is entered around every launch.
    """
    global _watching
    if not _watching:
        _install_watching()
        _watching = True
    _watchers.append((watcher, launches))


def unwatch(watcher: Watcher) -> None:
    """Undo watch()."""
    _watchers[:] = [entry for entry in _watchers if entry[0] != watcher]


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
    launch = base.GridExecutor.__call__

    def tell(ptrs: Any, mask: Any, kind: str, values: Any = None) -> Any:
        """The mask, less the lanes that a watcher leaves out."""
        inside = np.ones(ptrs.data.shape, np.bool_) if mask is None else _boolean(mask)
        size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        for watcher, _ in _watchers:
            left_out = watcher(ptrs.data, inside, size, kind, values)
            if left_out is not None:
                inside = inside & ~left_out
                mask = Handle(inside, base.tl.int1)
        return mask

    def create_masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        if _watchers:
            mask = tell(ptrs, mask, "load")
        return load(self, ptrs, mask, *rest, **named)

    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        if _watchers:
            mask = tell(ptrs, mask, "store", value.data)
        return store(self, ptrs, value, mask, *rest, **named)

    def create_atomic_rmw(self: Any, op: Any, ptr: Any, val: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        if _watchers:
            mask = tell(ptr, mask, "atomic")
        return rmw(self, op, ptr, val, mask, *rest, **named)

    def create_atomic_cas(self: Any, ptr: Any, *rest: Any, **named: Any) -> Any:
        if _watchers:
            tell(ptr, None, "atomic")
        return cas(self, ptr, *rest, **named)

    def call(self: Any, *args: Any, **named: Any) -> Any:
        with ExitStack() as stack:
            for _, launches in _watchers:
                if launches is not None:
                    arguments = {**dict(zip(self.arg_names, args, strict=False)), **named}
                    stack.enter_context(launches(self.fn.__name__, arguments))
            return launch(self, *args, **named)

    Builder.create_masked_load, Builder.create_masked_store = create_masked_load, create_masked_store
    Builder.create_atomic_rmw, Builder.create_atomic_cas = create_atomic_rmw, create_atomic_cas
    base.GridExecutor.__call__ = call


class _Memory:
    """Bytes at an address, for numpy to look at."""

    def __init__(self, address: int, count: int, kind: np.dtype[Any]) -> None:
        self.__array_interface__ = {"data": (address, True), "shape": (count,), "typestr": kind.str, "version": 3}


def bytes_at(address: int, count: int) -> Any:
    """`count` bytes of this process's memory."""
    return np.asarray(_Memory(address, count, np.dtype(np.uint8)))


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
