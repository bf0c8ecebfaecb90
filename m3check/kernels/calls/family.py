"""What a family of ops must tell `contract` so that its kernels can be called: one `Calls`, listed in FAMILIES."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from m3check.types import Inputs, Kernel, M3CheckError

if TYPE_CHECKING:
    from torch import Tensor

    from m3check.paging import Guard, World


class BrokenContract(M3CheckError):
    """A kernel that cannot be called, or whose result has the wrong shape or dtype."""


def whole(name: str, tensor: Tensor) -> Tensor | None:
    """All of a tensor is in use and may be read."""
    return None


@dataclass
class Physical:
    """What one kernel is called with."""

    arguments: dict[str, Any]
    """By keyword; what the kernel does not take is left out later."""
    buffers: Callable[[frozenset[str]], dict[str, Guard]]
    """What the kernel writes into, by keyword, of those that it is to be given; the one that holds its result first."""
    readable: Callable[[str, Tensor], Tensor | None] = whole
    """Of an argument: bool over its first dimensions, the cells that may be read; None for all."""
    touched: Callable[[str, Tensor], Tensor | None] = whole
    """The part of a vast argument that is in use; None for all."""
    take: Callable[[Any, Mapping[str, Guard]], Taken] | None = None
    """Reads the result (or the first buffer) where that takes tensors of this very call; None: the family's own."""


@dataclass
class Taken:
    """A result in logical form; all are copies."""

    outputs: dict[str, Tensor]
    beyond: dict[str, Tensor] = field(default_factory=dict)
    """Cells that a returned tensor has past the logical shape."""
    given: dict[str, Tensor] = field(default_factory=dict)
    """What the buffer for an output holds, cut like it, where the kernel returned another tensor."""


@dataclass(frozen=True)
class Calls:
    """How the kernels of a family are called."""

    parameters: Mapping[str, str]
    """Each keyword with its shape, dtype and meaning."""
    signatures: Mapping[str, tuple[tuple[str, ...], str]]
    """op: (its keywords, what comes back)"""
    letters: str
    """What the letters of the shapes are."""
    physical: Callable[[Kernel, Inputs, World, frozenset[str], Mapping[str, Tensor]], Physical]
    """From (kernel, inputs, world, the keywords it takes, results of earlier ops of a chain)."""
    take: Callable[[Kernel, Any, Inputs, Mapping[str, Guard]], Taken]
    """From (kernel, what it returned or its first buffer, inputs, buffers); raises BrokenContract for another shape."""
    optional: frozenset[str] = frozenset()
    """Keywords that a kernel may do without: buffers, where it returns its result, and what follows from the others."""
    named_only: frozenset[str] = frozenset()
    """Buffers that a function with **keywords gets only where it names them: nobody promised to write into them."""
    returnable: frozenset[str] = frozenset()
    """Buffers that a kernel may allocate itself."""
    channelled: frozenset[str] = frozenset()
    """Tensors whose last dimension may be strided, for kernels that promise to bear it."""
    token_dimension: Mapping[str, int] = field(default_factory=dict)
    """Which dimension of a tensor counts the query tokens, or other rows that `far_rows` promises to bear far apart."""
    fresh: frozenset[str] = frozenset()
    """What the kernel launched before an op's own writes, in the model."""
    held: frozenset[str] = frozenset()
    """Buffers that hold something when the kernel begins, so that it may read them before it writes."""


def checked(kernel: Kernel, name: str, result: Any, shape: tuple[int, ...], *dtypes: Any) -> Tensor:
    """A result of exactly this shape and one of these dtypes, copied; else BrokenContract says what was wanted."""
    import torch

    if not isinstance(result, torch.Tensor):
        raise BrokenContract(f"{kernel.name} returned {type(result).__name__}, wanted a tensor {list(shape)}")
    if tuple(result.shape) != shape:
        raise BrokenContract(f"{kernel.name} gave {name} of shape {list(result.shape)}, wanted {list(shape)}")
    if result.dtype not in dtypes:
        raise BrokenContract(f"{kernel.name} gave {name} as {result.dtype}, wanted {dtypes[0]}")
    return result.detach().clone()
