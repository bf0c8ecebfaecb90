"""What a layer does to fresh queries and keys before attention: a norm for each head, then a rotation by position.

    normed = x / sqrt(mean(x²) + eps) · (1 + w)                  over the D channels of one head
    first' = first · cos - second · sin                          first, second: the halves of the R rotated channels
    second' = second · cos + first · sin                         channels from R on pass

Norm weights w [D] are shared by the heads of a kind; index keys are one head. `cos_sin` [positions, R] holds R/2 cosines
and then R/2 sines of each position, as they are: their own rounding is part of the model. Values are not touched.
Whatever is written, and into whichever cache, is these numbers rounded once; a cache stores them with scale 1.
"""

from __future__ import annotations

import torch
from torch import Tensor


def qknorm_rope_insert(
    x_q: Tensor,
    x_k: Tensor,
    x_v: Tensor,
    x_idx_q: Tensor,
    x_idx_k: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_idx_q: Tensor,
    w_idx_k: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    eps: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """(q, k, v, index q, index k) [T, heads, D] in `dtype`, unrounded; without an index branch its x have no heads."""
    cos, sin = cos_sin[positions].to(dtype)[:, None].chunk(2, dim=-1)  # [T, 1, R / 2]

    def worked(x: Tensor, weight: Tensor) -> Tensor:
        return _rotated(_normed(x.to(dtype), weight.to(dtype), eps.to(dtype)), cos, sin)

    return worked(x_q, w_q), worked(x_k, w_k), x_v.to(dtype), worked(x_idx_q, w_idx_q), worked(x_idx_k, w_idx_k)


def _normed(x: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
    """Heads [..., D] at unit mean square, times 1 + weight."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (1 + weight)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads [T, heads, D] with the channels i and i + R/2 turned into each other by cos and sin [T, 1, R/2]."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
