"""What a kernel may read and write, told by the cells that must keep their bits, and what it did against that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from m3check.paging.tensors import filled, words

MARGIN = 256
"""Watched elements on each side of a buffer; a multiple of 16 bytes in every dtype, so that alignment is kept."""

SPARE_ROWS = 3
"""Rows of an id buffer past the batch's own, as one that was made for the largest batch has them."""


class Guard:
    """A buffer that a kernel may write, inside a larger one whose every other cell must keep its bits."""

    def __init__(self, name: str, backing: Tensor, view: Tensor, owned: Tensor) -> None:
        self.name = name
        self.view = view
        self._backing = backing
        self._before = backing.clone()
        self._owned = owned  # bool, shaped like backing: cells that the kernel may write

    def reset(self) -> None:
        """Put back what the buffer and its surroundings held at first."""
        words(self._backing).copy_(words(self._before))

    def hold(self, other: Guard) -> None:
        """Hold what another buffer of this shape and its surroundings hold."""
        words(self._backing).copy_(words(other._backing))

    def own(self, dim: int, count: int) -> None:
        """Let the kernel write the first `count` entries of one dimension of the view only."""
        rest = self.view.narrow(dim, count, self.view.shape[dim] - count)
        self._owned.as_strided(rest.shape, rest.stride(), rest.storage_offset())[...] = False

    def overwritten(self) -> list[int]:
        """Flat positions of cells outside the view that changed, relative to the view's first element."""
        changed = (words(self._backing) != words(self._before)) & ~self._owned
        return [int(i) - int(self.view.storage_offset()) for i in changed.nonzero().flatten()[:8]]

    def place(self, position: int) -> str:
        """What a foreign cell is, by its flat position from the view's first element; empty where that is not known."""
        return ""


def guarded(
    name: str,
    shape: Sequence[int],
    value: float,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    strided: bool = False,
    spare: int = 0,
) -> Guard:
    """A watched buffer prefilled with `value`; `strided` leaves foreign cells after each innermost row as well.

    A kernel is given `spare` more entries of the last dimension but one than `shape` says, and must not write them.
    """
    *outer, inner = map(int, shape)
    if spare:
        outer[-1] += spare
    width = inner + 16 if strided else inner
    count = width
    for n in outer:
        count *= n
    backing = filled([count + 2 * MARGIN], value, dtype, device)
    view = backing[MARGIN : MARGIN + count].view(*outer, width)[..., :inner]
    owned = torch.zeros(backing.shape, dtype=torch.bool, device=device)
    owned[MARGIN : MARGIN + count].view(*outer, width)[..., : outer[-1] - spare, :inner] = True
    return Guard(name, backing, view, owned)


@dataclass(frozen=True)
class Frozen:
    """An input that a kernel must not write: its storage and a copy of it."""

    name: str
    tensor: Tensor
    before: Tensor

    @classmethod
    def of(cls, name: str, tensor: Tensor, touched: Tensor | None = None) -> Frozen:
        """Watch a tensor's whole storage, cells outside its view included; or only the part `touched` of a vast one."""
        if touched is not None:
            return cls(name, touched, touched.clone())
        whole = torch.tensor([], dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
        return cls(name, whole, whole.clone())

    def changed(self) -> int:
        """How many elements of the storage have other bits than before."""
        return int((words(self.tensor) != words(self.before)).sum())


@dataclass(frozen=True)
class Territory:
    """What a kernel may do with one tensor of its call: read and write the cells of this view, and no others."""

    name: str
    view: Tensor
    owned: Tensor | None = None
    """Bool over the first dimensions: cells that may be read; None for all. The others belong to nobody."""
    output: bool = False
    """Whether it may be written; then a cell may be read only after it was."""
    fresh: bool = False
    """Whether the kernel that is launched before may still be writing it: a dependent launch must wait first."""
    held: bool = False
    """Whether an output holds something at first, so that it may be read before it is written."""


Misuse = Literal["outside", "unowned", "input", "unwritten", "race", "unordered", "early"]
"""Of an access: beside every tensor; in a page that no request owns; a write into an input; a read of a cell that nothing
wrote; a write where another program of the launch wrote another value; a read of what another program of it wrote; a read,
by a dependent launch that has not waited, of what the launch before it wrote."""


@dataclass(frozen=True)
class Access:
    """One way in which one line of a kernel misused memory. Only an interpreted run can tell."""

    misuse: Misuse
    kind: Literal["load", "store", "atomic"]
    tensor: str
    where: str  # in elements or pages of the tensor
    kernel: str
    program: tuple[int, int, int]  # the first that did it
    line: str  # of the kernel's source: file.py:12
    count: int  # elements, over all programs
    harmless: bool = False  # a read of what nothing wrote, on which the result does not depend


@dataclass
class Observation:
    """What watching a call brought: how many kernels were launched, and each misuse of memory."""

    launches: int = 0
    accesses: list[Access] = field(default_factory=list)
