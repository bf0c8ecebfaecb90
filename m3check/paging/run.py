"""One call of a kernel: what may differ in it and must not change its result, and what came back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from m3check.arch import Arithmetic
from m3check.paging.tensors import Poison
from m3check.paging.watched import Access, Frozen, Guard


@dataclass(frozen=True)
class World:
    """The physical choices of one call that must not change its result."""

    poison: Poison = "nan"
    salt: str = ""  # another page order
    layout: str = ""  # another memory order than the case's: hnd, nhd or pool
    odd_strides: bool = False  # dimensions of size 1 have a stride that means nothing
    far: bool = False  # pages so far into their cache that offsets pass 2^31 elements
    far_rows: bool = False  # likewise the rows of queries, id lists, scores and outputs
    max_seq_len: int = 0  # what the graph provides for; 0: the batch's own longest
    max_query_len: int = 0  # likewise; 0: the case's own
    columns: int = 0  # at least so many columns of the block table
    pages: int = 0  # at least so many pages
    own_buffers: bool = False  # a kernel that can allocate its result is given no buffer
    apart: bool = False  # channels, ids and score columns are every second element of their rows
    contiguous: bool = False  # pages in order; no run does so, since it hides mistakes, but a diagnosis may
    earlier: Literal["", "other", "stale", "captured"] = ""  # `indexer`: another batch was served before; or its metadata


@dataclass
class Served:
    """What is seen of one step of a mixed batch (op `indexer`) beside its results."""

    index: dict[str, Any] = field(default_factory=dict)
    """The indexer's metadata as nested dicts of figures, and (dtype, values) of tensors."""
    main: dict[str, Any] = field(default_factory=dict)
    """Likewise attention's."""
    moved: list[str] = field(default_factory=list)
    """Tensors of them that a captured graph reads and that lay elsewhere for the batch before."""
    waits: list[str] = field(default_factory=list)
    """Reads of device memory by host code, with their source lines."""
    slots: list[int] = field(default_factory=list)
    """Of each query token, where it is inserted in the main cache; -1 for nowhere."""
    tables: dict[str, list[list[int]]] = field(default_factory=dict)
    """Of each cache group, `index` and `main`, the pages of each request."""
    scores: Tensor | None = None
    """[H, T, K]: the persistent score buffer after the step, of an implementation that keeps scores there."""
    unset: list[str] = field(default_factory=list)
    """Score buffers of the metadata that `build` did not fill with -inf."""
    returned: list[tuple[list[int], bool, int | None, bool] | None] = field(default_factory=list)
    """Of the lists that the indexer returned of decoded and of prefilled rows: shape, whether in the id buffer, the row
    there that it begins in (None of an empty one), whether equal to its rows there. None where it returned none."""


@dataclass
class Run:
    """One call of a kernel: its results in logical form, and the memory that was watched meanwhile."""

    outputs: dict[str, Tensor]
    guards: list[Guard] = field(default_factory=list)
    frozen: list[Frozen] = field(default_factory=list)
    beyond: dict[str, Tensor] = field(default_factory=dict)
    """Cells that a returned tensor has past the logical shape, by output name."""
    given: dict[str, Tensor] = field(default_factory=dict)
    """What the buffer for an output holds, cut like it, where the kernel returned another tensor."""
    accesses: list[Access] | None = None
    """Every misuse of memory that was seen; None where nobody looked, or no interpreted kernel was launched."""
    arithmetic: Arithmetic | None = None
    """How this call summed; None where that is not known, as in a run put together from several."""
    served: Served | None = None
    """Of a mixed batch."""
