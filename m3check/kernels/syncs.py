"""Host code that waits for the device: every read of a device tensor's contents while a block runs, with its source line.

On a machine without a GPU tensors that stand for device memory are named, and what is computed from them is followed, so
that a wait is seen where nothing waits.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

READS = frozenset(
    {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__complex__", "cpu", "numpy", "__array__",
     "nonzero", "argwhere", "equal", "allclose", "masked_select", "unique", "unique_consecutive", "is_nonzero",
     "__contains__", "__repr__", "__format__", "bincount"}
)  # fmt: skip
"""Functions of torch that need the contents of a tensor, or how many of its elements are true, on the host."""

SIZES = frozenset(
    {"arange", "linspace", "zeros", "ones", "empty", "full", "new_zeros", "new_ones", "new_empty", "new_full", "narrow",
     "view", "reshape", "expand", "repeat", "tile", "split", "chunk", "unfold", "full_like"}
)  # fmt: skip
"""Functions that need numbers on the host: where one of these is a tensor, its contents are read."""

FACTORIES = frozenset({"arange", "linspace", "zeros", "ones", "empty", "full"})
"""Those of them that are called on no tensor."""

OWN = ("triton", "m3check/interpret", "m3check/compiled")
"""Packages whose reads are none of the kernel's host code: they stand in for a launch."""


class Watch(TorchFunctionMode):
    """Notes every wait of the block in `found`, as `function at file:line`."""

    def __init__(self, device: Sequence[Tensor], host: Sequence[Tensor]) -> None:
        """`device` tensors stand for device memory wherever they are; `host` ones for the host's."""
        super().__init__()
        self.found: list[str] = []
        self._kept = [*device, *host]  # memory that is freed would be given to another tensor
        self._device = {_storage(tensor) for tensor in device}
        self._host = {_storage(tensor) for tensor in host}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Pass the call on; note it where it reads a device tensor."""
        kwargs = kwargs or {}
        file = sys._getframe(1).f_code.co_filename
        if any(f"/{package}/" in file for package in OWN):
            return func(*args, **kwargs)
        given = list(_tensors((args, kwargs)))
        name = getattr(func, "__name__", "")
        on_device = [tensor for tensor in given if self._is_device(tensor)]
        if on_device and self._waits(name, args, kwargs) and (place := _caller()):
            self.found.append(f"{name} at {place}")
        result = func(*args, **kwargs)
        if on_device and name not in READS:
            for tensor in _tensors(result):
                self._kept.append(tensor)
                self._device.add(_storage(tensor))
        return result

    def _is_device(self, tensor: Tensor) -> bool:
        return tensor.is_cuda or _storage(tensor) in self._device

    def _waits(self, name: str, args: Any, kwargs: Any) -> bool:
        if name in READS:
            return True
        if name == "to":
            return any(str(x) == "cpu" for x in (*args[1:], *kwargs.values()) if isinstance(x, str | torch.device))
        if name == "copy_":
            return _storage(args[0]) in self._host or (args[1].is_cuda and not args[0].is_cuda)
        if name in ("__getitem__", "__setitem__", "index_put_"):
            return any(self._is_device(x) for x in _read_by_indexing(args[1:2]))
        if name in SIZES:
            return any(self._is_device(x) for x in _tensors((args if name in FACTORIES else args[1:], kwargs)))
        if name in ("tensor", "as_tensor"):  # of a tensor itself, a copy where it lies; of a list, number by number
            return isinstance(args[0], list | tuple)
        if name == "where":  # of a condition alone: the places where it holds
            return len(args) + len(kwargs) == 1
        if name == "repeat_interleave":
            repeats = kwargs.get("repeats", args[min(1, len(args) - 1)] if args else None)
            return kwargs.get("output_size") is None and isinstance(repeats, Tensor) and self._is_device(repeats)
        return False


def _read_by_indexing(index: Any) -> Iterator[Tensor]:
    """Tensors of an index that the host must know: masks (turned into places first), single numbers, ends of slices."""
    for each in index if isinstance(index, list | tuple) else (index,):
        if isinstance(each, slice):
            yield from _tensors(each)
        elif isinstance(each, Tensor) and (each.dtype == torch.bool or not each.dim()):
            yield each
        elif isinstance(each, list | tuple):
            yield from _read_by_indexing(each)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else id(tensor)


def _tensors(held: Any) -> Iterator[Tensor]:
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, dict):
        for value in held.values():
            yield from _tensors(value)
    elif isinstance(held, list | tuple):
        for value in held:
            yield from _tensors(value)
    elif isinstance(held, slice):
        yield from _tensors((held.start, held.stop, held.step))


def _caller() -> str:
    """file.py:12 of the host code that asked; empty where a launch of Triton's is at work."""
    frame = sys._getframe(2)
    place = ""
    while frame is not None:
        file = frame.f_code.co_filename.replace("\\", "/")
        if any(f"/{package}/" in file for package in OWN):
            return ""
        if not place and "/torch/" not in file and not file.endswith("kernels/syncs.py"):
            place = f"{Path(file).name}:{frame.f_lineno}"
        if "/kernels/indexer/" in file:
            break
        frame = frame.f_back  # type: ignore[assignment]
    return place
