"""What `torch.empty` gives while a kernel runs, so that a cell which nothing wrote is seen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def filled_memory() -> Iterator[None]:
    """torch.empty inside the block gives NaN (floats) or the largest integer, so that an unwritten cell is seen."""
    import torch

    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")  # as use_deterministic_algorithms, which also imports a compiler for seconds
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


@contextmanager
def fresh_garbage() -> Iterator[None]:
    """torch.empty and its like inside the block give large finite numbers, and integers that look like block ids."""
    import torch
    from torch.overrides import TorchFunctionMode

    from m3check import paging

    fresh = {torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty}

    class Garbage(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func in fresh and isinstance(result, torch.Tensor) and result.numel():
                if not result.is_floating_point():
                    result.fill_(1)
                elif result.element_size() == 1:
                    value = paging.filled([1], paging.poison_value(result.dtype, "garbage"), result.dtype, "cpu")
                    result.view(torch.uint8).fill_(int(value.view(torch.uint8)))
                else:
                    result.fill_(paging.poison_value(result.dtype, "garbage"))
            return result

    with Garbage():
        yield
