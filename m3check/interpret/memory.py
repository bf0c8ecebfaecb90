"""Every load and store of an interpreted kernel goes through this file once a repair or the fast path is installed."""

from __future__ import annotations

from typing import Any

import numpy as np
from triton.runtime import interpreter as base

Builder = base.InterpreterBuilder
Handle = base.TensorHandle


def _boolean(mask: Any) -> Any:
    """The mask as an array of bool; block pointers and descriptors hand over plain arrays, others handles."""
    data = mask if isinstance(mask, np.ndarray) else mask.data
    return data if data.dtype == np.bool_ else data.astype(np.bool_)


def repair_masks() -> None:
    """A mask is taken for what it says, whatever integer type holds it."""
    load, store, rmw = Builder.create_masked_load, Builder.create_masked_store, Builder.create_atomic_rmw

    def create_masked_load(self: Any, ptrs: Any, mask: Any, other: Any, *rest: Any, **named: Any) -> Any:
        return load(self, ptrs, Handle(_boolean(mask), base.tl.int1), other, *rest, **named)

    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        return store(self, ptrs, value, Handle(_boolean(mask), base.tl.int1), *rest, **named)

    def create_atomic_rmw(self: Any, op: Any, ptr: Any, val: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        return rmw(self, op, ptr, val, Handle(_boolean(mask), base.tl.int1), *rest, **named)

    Builder.create_masked_load, Builder.create_masked_store = create_masked_load, create_masked_store
    Builder.create_atomic_rmw = create_atomic_rmw
