"""Tiles of latent attention: measured by a warm-up before serving, else a table's. No other call measures anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from m3check.kernels.triton import tiles

LATENT = [
    triton.Config({"ROWS": rows, "KEYS": keys}, num_warps=warps, num_stages=1)
    for rows, keys, warps in ((64, 32, 8), (32, 32, 8), (16, 32, 8), (16, 16, 4))
]
"""What latent attention may take, the smallest last: 64 heads fill the matrix units of sm90 and sm100, where they fit."""

_measuring = False


def latent(configs: Sequence[triton.Config], named: Mapping[str, Any], **_: Any) -> list[triton.Config]:
    """What a warm-up tries for these heads and this dtype; at any other time the one configuration of the tables."""
    heads, dtype = named["heads"], named["q"].dtype
    keys = tiles.latent_keys(dtype)
    if not _measuring:
        figures = {"ROWS": tiles.latent_heads(heads), "KEYS": keys}
        return [triton.Config(figures, num_warps=8 if keys > 16 else 4, num_stages=1)]
    if dtype is torch.float32:  # it takes twice the memory, and no matrix unit
        return [configs[-1]]
    least = max(16, tiles.power_of_two(heads))
    return [config for config in configs if config.kwargs["ROWS"] <= least]


def timed(launch: Callable[[], None], quantiles: Sequence[float]) -> Any:
    """Milliseconds that a configuration takes, as Triton's autotuner wants them; the only one there is, is not timed."""
    if _measuring:
        return driver.active.get_benchmarker()(launch, quantiles=quantiles)
    launch()
    return [0.0] * len(quantiles)


@contextmanager
def measuring(kernel: Any) -> Iterator[None]:
    """Launches of an autotuned kernel measure inside, and forget what was chosen before; later ones take the fastest."""
    global _measuring
    kernel.cache.clear()
    _measuring = True
    try:
        yield
    finally:
        _measuring = False


DECODED = 16
"""Queries of the batch on which lists in parts are timed."""


def warm_up(call: Callable[..., tuple[Tensor, Tensor]], launch: Callable[..., None], kernel: Any) -> Callable[..., None]:
    """The warm-up of latent attention: made of its function, of what launches lists in parts, and of the tuned kernel."""

    def warm_up(
        q: Tensor,
        kv: Tensor,
        indices: Tensor,
        sm_scale: float,
        d_v: int,
        output: Tensor | None = None,
        lse_out: Tensor | None = None,
    ) -> None:
        """Before serving: compile all that calls with these heads, topk and dtypes need, and time what they may take.

        The arguments are those of a call, best of the largest batch, whose results it leaves behind. Batches of any other
        size compile and measure nothing from then on. Raises ValueError for a batch without a query.
        """
        if not len(q):
            raise ValueError("a warm-up needs a query")
        out, lse = call(q, kv, indices, sm_scale, d_v, output, lse_out)
        with measuring(kernel):
            launch(q, kv, indices, sm_scale, out, lse, 1)
            few = min(len(q), DECODED)
            launch(q[:few], kv, indices[:few], sm_scale, out[:few], lse[:few], max(2, tiles.splits(few, 8)))

    return warm_up
