"""Around functions of a library with an interface of its own: the strides that it takes, and the time it compiles in."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Function = Callable[..., Any]


class Clock:
    """Says when calls begin and end that may compile, so that time limits leave them out.

    nvcc and CuTe-DSL compile inside the first call of each variant, for a minute and more. A launch returns at once, so
    that a call takes no time to speak of otherwise.
    """

    def __init__(self) -> None:
        self._tell: Callable[[bool], None] = lambda began: None

    def listen(self, tell: Callable[[bool], None]) -> None:
        """Who is told from now on: True before a call, False after it."""
        self._tell = tell

    def stopped(self, function: Function) -> Function:
        """The function, told of."""

        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            self._tell(True)
            try:
                return function(*args, **options)
            finally:
                self._tell(False)

        return call


def with_regular_strides(function: Function) -> Function:
    """A kernel's function that is given `regular` tensors."""

    @functools.wraps(function)
    def call(**keywords: Any) -> Any:
        return function(**{name: regular(value) for name, value in keywords.items()})

    return call


def regular(value: Any) -> Any:
    """A tensor whose dimensions of size 1 have strides as a fresh one's; all else as it is.

    A Triton kernel multiplies such a stride by 0. A library checks it, or encodes it in a TMA descriptor, where it must be
    a multiple of 16 bytes; what a server passes has regular ones.
    """
    if not hasattr(value, "as_strided") or 1 not in value.shape:
        return value
    strides, next_stride = list(value.stride()), 1
    for i in reversed(range(value.dim())):
        if value.shape[i] == 1:
            strides[i] = next_stride
        next_stride = strides[i] * value.shape[i]
    return value.as_strided(value.shape, strides, value.storage_offset())


@contextmanager
def dense(output: Tensor) -> Iterator[Tensor]:
    """What a library may write in place of `output`, row after row without gaps, as a server's buffer is."""
    import torch

    if output.is_contiguous():
        yield output
        return
    whole = torch.empty_like(output, memory_format=torch.contiguous_format)
    yield whole
    output.copy_(whole)
