"""How much one program takes on: tile sizes from shapes and dtypes alone, so that a captured graph stays valid."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3check.types import BLOCK

WAVE = 512
"""Programs that fill a large GPU about twice over; splits stop there."""

INTERPRETED_WAVE = 64
"""The same for the interpreter, which runs programs one after another and pays for each."""


def interpreted() -> bool:
    """Whether launches go to Triton's interpreter, where few large tiles are cheaper than many small ones."""
    return bool(triton.knobs.runtime.interpret)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n` and at least 1."""
    return 1 << max(0, n - 1).bit_length()


def floor_power_of_two(n: int) -> int:
    """The largest power of two that is at most `n`, at least 1."""
    return 1 << (max(1, n).bit_length() - 1)


def splits(programs: int, most: int) -> int:
    """Into how many parts to cut the work of each of `programs` programs, at most `most`."""
    wave = INTERPRETED_WAVE if interpreted() else WAVE
    return max(1, min(floor_power_of_two(wave // max(1, programs)), most))


def score_rows(rows: int, dtype: torch.dtype) -> int:
    """(query, head) pairs of one score tile; tl.dot wants 16 at least."""
    most = 16 if dtype is torch.float32 and not interpreted() else 64
    return max(16, min(power_of_two(rows), most))


def score_keys(dtype: torch.dtype) -> int:
    """Keys of one step of the score kernels: a divisor of a block; fp32 tiles take twice the memory and no MMA."""
    return 32 if dtype is torch.float32 and not interpreted() else BLOCK


def attention_keys(dtype: torch.dtype) -> int:
    """Keys of one step of attention; K and V of two steps fit the 64 KB that a gfx942 block may use."""
    if interpreted():
        return 8 * BLOCK
    return 32 if dtype is torch.float32 else 64


WIDTHS = (64, 256, 1024)
"""Columns that a selection tile has on a device: few, so that a warm-up can compile for all of them."""


def selection_width(columns: int) -> int:
    """Columns of one selection tile of sort keys (8 bytes each)."""
    if interpreted():
        return max(16, min(power_of_two(columns), 1 << 13))
    return next((width for width in WIDTHS if columns <= width), WIDTHS[-1])


def selection_rows(rows: int, width: int) -> int:
    """Rows of a selection tile of `width` columns; on a device the same for every batch, since it is compiled for."""
    if interpreted():
        return max(1, min(power_of_two(rows), (1 << 16) // width, 64))
    return max(1, (1 << 10) // width)


def stages(dtype: torch.dtype) -> int:
    """Steps in flight; one of fp32, whose tiles would not fit twice."""
    return 1 if dtype is torch.float32 else 2


def head_tile() -> int:
    """(token, head) rows that one program of an insert norms and rotates."""
    return 256 if interpreted() else 16


def logit_keys() -> int:
    """Keys of one tile of indexer logits, which all heads share."""
    return 512 if interpreted() else 64


def latent_heads(heads: int) -> int:
    """Query heads of one program of latent attention; all of them read the same keys."""
    return max(16, min(power_of_two(heads), 128)) if interpreted() else 16


def latent_keys(dtype: torch.dtype) -> int:
    """Listed tokens of one step of latent attention, whose keys have 576 channels."""
    if interpreted():
        return 128
    return 16 if dtype is torch.float32 else 32


def head_rows(gqa: int) -> int:
    """Query heads of one KV head as rows of a tile; tl.dot wants 16 at least."""
    return max(16, power_of_two(gqa))


TL_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The narrowest dtype that holds every operand exactly; fp8 alone becomes bf16, which holds all its dialects."""
    wide = {t.dtype for t in tensors if t.dtype.itemsize > 1}
    if not wide:
        return torch.bfloat16
    return wide.pop() if len(wide) == 1 else torch.float32


@contextmanager
def chosen(**figures: Callable[..., Any]) -> Iterator[None]:
    """Other functions of this file in place of those of the same name."""
    before = {name: globals()[name] for name in figures}
    globals().update(figures)
    try:
        yield
    finally:
        globals().update(before)


CHOICES = (
    ("the tile sizes of a device", partial(chosen, interpreted=lambda: False)),
    (
        "the smallest tiles and as many parts as can be",
        partial(
            chosen,
            splits=lambda programs, most: most,
            score_rows=lambda rows, dtype: 16,
            score_keys=lambda dtype: 32,
            attention_keys=lambda dtype: 32,
            latent_heads=lambda heads: 16,
            latent_keys=lambda dtype: 16,
            logit_keys=lambda: 32,
            selection_width=lambda columns: 4,  # more parts than a merge always has room for
            selection_rows=lambda rows, width: 8,
            head_tile=lambda: 4,
        ),
    ),
    (
        "no parts, and a tile for each row of a selection",
        partial(
            chosen,
            splits=lambda programs, most: 1,
            selection_width=lambda columns: max(16, power_of_two(columns)),
            selection_rows=lambda rows, width: 1,
        ),
    ),
)
"""What must not change a result beyond its rounding, to be tried where the interpreter's own figures would hide a loop."""
