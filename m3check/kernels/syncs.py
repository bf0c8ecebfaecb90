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
     "__contains__"}
)  # fmt: skip
"""Functions of torch that need the contents of a tensor, or how many of its elements are true, on the host."""

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
        if name in ("__getitem__", "__setitem__", "index_put_"):  # a mask is turned into places first
            return any(x.dtype == torch.bool and self._is_device(x) for x in _tensors(args[1:2]))
        return False


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
