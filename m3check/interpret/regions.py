"""One storage of a watched call: what each of its elements may be used for, and who wrote it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided

OWN, READ, WRITE, WRITTEN = 1, 2, 4, 8
"""A cell of a view; that may be read; that may be written; that holds something."""

LIMIT = 1 << 30
"""Bytes of a storage that is judged; the flags of a larger one would cost too much."""

SEVERAL = -1
"""Stands for the program that wrote a cell where several wrote the same value."""


class Region:
    """One storage: flags and, within a launch, the program that wrote each cell."""

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self.name = name
        self.keep: Any = storage  # memory that is freed would be given to another tensor
        self.base = storage.data_ptr()
        self.size = storage.nbytes()
        self.cell = tensor.element_size()
        self.flags = np.zeros(self.size // self.cell if self.size <= LIMIT else 0, np.uint8)
        self.page = 0, 1  # of the first view: its first cell, and cells to the next index of its first dimension
        self.writers: Any = None
        self.launch = -1
        self.earlier: tuple[int, Any] = -1, None  # the launch before `launch` that wrote, and its writers

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.base + self.size

    def view(self, tensor: torch.Tensor) -> Any:
        """The flags of a view's cells; writing to them writes to the region's."""
        ratio, rest = divmod(tensor.element_size(), self.cell)
        if rest:  # narrower than the cells known so far
            ratio, narrow = 1, tensor.element_size()
            self.flags = self.flags.repeat(self.cell // narrow)
            self.cell, self.writers = narrow, None
        shape, strides = tuple(tensor.shape), tuple(s * ratio for s in tensor.stride())
        if ratio > 1:
            shape, strides = (*shape, ratio), (*strides, 1)
        return as_strided(self.flags[tensor.storage_offset() * ratio :], shape, strides)

    def distance(self, cell: int) -> str:
        """How far a cell is from the nearest one of a view."""
        own = np.flatnonzero(self.flags & OWN)
        after = int(np.searchsorted(own, cell))
        past = cell - int(own[after - 1]) if after else None
        before = int(own[after]) - cell if after < len(own) else None
        if past is not None and (before is None or past <= before):
            return f"{elements(past)} past {'a cell of its view' if before is not None else 'its end'}"
        assert before is not None  # a view has at least one cell
        return f"{elements(before)} before {'a cell of its view' if past is not None else 'its start'}"

    def element(self, cell: Any) -> str:
        """A cell in words, counted from the first of the view."""
        return f"element {int(cell) - self.page[0]}"

    def write(self, cells: Any, program: int, launch: int) -> Any:
        """Note who writes; the cells (bool) that another program of this launch wrote before."""
        if self.launch != launch or self.writers is None:
            self.earlier = self.launch, self.writers
            self.writers, self.launch = np.zeros(len(self.flags), np.int32), launch
        before = self.writers[cells]
        others = (before != 0) & (before != program)
        self.writers[cells] = np.where(others, SEVERAL, program)
        self.flags[cells] |= WRITTEN
        return others

    def take_as_written(self, tensor: torch.Tensor, launch: int) -> None:
        """Say that a launch before the watch wrote the cells of a view."""
        kept = self.flags
        self.flags = np.zeros(len(kept), np.uint8)
        self.view(tensor)[...] = 1
        self.writers, self.flags, self.launch = self.flags.astype(np.int32), kept, launch

    def written_by(self, launch: int, cells: Any) -> Any:
        """The cells (bool) that a launch wrote and that no later one has written since; None where it wrote none."""
        if launch == self.launch and self.writers is not None:
            return self.writers.take(cells) != 0
        if launch == self.earlier[0] and self.earlier[1] is not None and len(self.earlier[1]) == len(self.writers):
            return (self.earlier[1].take(cells) != 0) & (self.writers.take(cells) == 0)
        return None


def elements(count: int) -> str:
    """A number of elements in words."""
    return "1 element" if count == 1 else f"{count} elements"
