"""What an implementation of the op `indexer` is: made once for a model and the largest batch, then given step after step.

It is host code around kernels, as a server runs it: `build` turns a batch into metadata, `forward` launches the kernels,
which hand ids over in one persistent buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Layout = Literal["head", "token"]
"""Of the persistent id buffer: `head` is [H, max_tokens, topk], `token` is [max_tokens, H, topk]."""


@dataclass(frozen=True)
class Figures:
    """What an implementation is made for."""

    kv_heads: int
    """Also the index heads."""
    heads: int
    head_dim: int
    topk: int
    init_blocks: int
    local_blocks: int
    sm_scale: float
    index_dtype: str
    """Dtype word of the index cache."""
    cache_dtype: str
    max_tokens: int
    max_requests: int
    max_seq_len: int
    max_query_len: int
    """The longest query that counts as a decode."""
    device: torch.device


@dataclass(frozen=True)
class Buffers:
    """Persistent memory that outlives a step; rows of the current batch stand first."""

    ids: Tensor
    """int32, in the layout that the implementation named."""
    scores: Tensor
    """[H, max_tokens, K] fp32; an implementation may do without."""


@dataclass(frozen=True)
class Batch:
    """One step. Tensors on the device are views of memory that is the same in every step."""

    query_starts: Tensor
    """[R + 1] int32, on the device."""
    query_starts_host: Tensor
    """The same on the host."""
    seq_lens: Tensor
    """[R] int32, on the device; 0 in a padded row."""
    seq_lens_host: Tensor
    index_table: Tensor
    """[R, columns] int32: pages of the index cache."""
    main_table: Tensor
    """[R, columns] int32: pages of the main cache."""
    positions: Tensor
    """[T] int64: each query token's place in its request; 0 in rows that see no token."""
    slots: Tensor
    """[T] int64: page · 128 + offset of each query token in the main cache; -1 in rows that see no token."""
    max_query_len: int
    max_seq_len: int

    @property
    def requests(self) -> int:
        """R."""
        return len(self.seq_lens_host)

    @property
    def tokens(self) -> int:
        """T, read on the host."""
        return int(self.query_starts_host[-1])


@dataclass(frozen=True)
class Tensors:
    """What `forward` reads and writes besides the persistent buffers; rows past T are padding, not to be touched."""

    idx_q: Tensor
    """[max_tokens, H · D]"""
    index_kv_cache: Tensor
    q: Tensor
    """[max_tokens, Hq · D]"""
    kv_cache: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None
    output: Tensor
    """[max_tokens, Hq · D]"""


class Implementation(Protocol):
    """One layer's indexer and attention."""

    keeps_scores: bool
    """Whether each step leaves the scores of its rows in `Buffers.scores`."""

    def build(self, batch: Batch) -> tuple[Any, Any]:
        """Metadata of the indexer and of attention, read by the names of their attributes."""

    def forward(self, metadata: tuple[Any, Any], tensors: Tensors) -> Sequence[Tensor | None]:
        """Run one step; returns the id lists of the decoded and of the prefilled part, None where there is none."""


class Maker(Protocol):
    """What `Kernel.function` is for this op."""

    layout: Layout

    def __call__(self, figures: Figures, buffers: Buffers) -> Implementation:
        """An implementation that keeps these buffers."""
