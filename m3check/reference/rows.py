"""What the references share: where a query stands, what it sees, what is forced on it, how rows are cut to fit memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from m3check.types import BLOCK, Request

CHUNK_BYTES = 32 * 2**20
"""Size of the largest temporary, of which a few live at once. Larger ones are no faster: the pages of each are new to the
process, and bringing them in costs more than the loop saves."""


def positions(requests: Sequence[Request], device: torch.device) -> Tensor:
    """Position of each of the T query tokens in its request, int64 [T]; negative for a dead row, which sees nothing."""
    rows = [torch.arange(request.prefix, request.prefix + request.query_len) for request in requests]
    return torch.cat([torch.zeros(0, dtype=torch.int64), *rows]).to(device)


def visible_blocks(position: Tensor) -> Tensor:
    """How many blocks a query at `position` sees, its own included; 0 for a dead row."""
    return ((position + BLOCK) // BLOCK).clamp(min=0)


def forced_blocks(position: Tensor, columns: int, init_blocks: int, local_blocks: int) -> tuple[Tensor, Tensor]:
    """Which visible blocks are (init, local) for queries at `position` [T], each [T, columns] bool.

    A block that is both counts as local, as in the common kernels, which write the local score last: so do the callers.
    """
    block = torch.arange(columns, device=position.device)  # [columns]
    visible = visible_blocks(position)[:, None]  # [T, 1]
    local = (block < visible) & (block >= visible - local_blocks)
    init = (block < visible) & (block < init_blocks)
    return init, local


def chunks(rows: int, bytes_per_row: int) -> Iterator[slice]:
    """Cut `rows` rows into slices whose temporaries stay within CHUNK_BYTES (one row at least)."""
    step = max(1, CHUNK_BYTES // max(1, bytes_per_row))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply fp32 matrices in fp32: no TF32 or bf16 passes, whatever the process has allowed elsewhere."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
