"""Tensors as memory: their bits, the values that fill what nobody owns, and how far apart their elements lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from m3check import arena
from m3check.types import DTYPES, Case

Poison = Literal["nan", "garbage"]

GARBAGE = 1.5e4
"""Large and finite in every cache dtype but e4m3, which saturates it to its own largest value."""

IMPOSSIBLE_ID = -7777
"""Prefilled into id buffers: no kernel writes it, so an unwritten slot is seen."""


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


def assignable(tensor: Tensor) -> Tensor:
    """The same memory, fp8 as bytes: not every device assigns fp8 by index, and bits are copied, not values."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def with_far_rows(tensor: Tensor, dim: int) -> Tensor:
    """A copy whose rows along `dim` lie so far apart that the last one begins past 2^31 elements."""
    return arena.spread(tensor, dim)


def apart(tensor: Tensor) -> Tensor:
    """A copy whose last dimension has stride 2; NaN, or an id that cannot be, stands between."""
    between = poison_value(tensor.dtype, "nan") if tensor.dtype.is_floating_point else IMPOSSIBLE_ID
    wide = filled([*tensor.shape, 2], between, tensor.dtype, tensor.device)
    assignable(wide)[..., 0] = assignable(tensor)
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
