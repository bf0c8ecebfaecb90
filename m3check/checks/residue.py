"""The error of a chunk in units of its noise, the noise of any projection of it, and how large a row of noise may be."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from m3check.checks.noise import SCATTERED, Noise, Pairs, ranks

TINY = 1e-30
"""σ² (of a channel whose largest |v| is 1) below which a channel is left to the element test."""

EXAMINED = 8
"""Suspects of a chunk whose noise is worked out with all its correlations; the worst ones by the simple rule."""


@dataclass(frozen=True)
class Residue:
    """Errors [P, G, D] and what they are weighed with."""

    error: Tensor
    precision: Tensor  # 1/σ², 0 where the channel is not weighed

    @classmethod
    def of(cls, error: Tensor, model: Noise) -> Residue:
        """Errors beyond a million σ count as that much, so that squares stay finite."""
        variance = model.variance
        weighed = variance > TINY
        limit = 1e6 * variance.sqrt()
        return cls(error.clamp(-limit, limit), torch.where(weighed, 1 / variance.clamp(min=TINY), 0))


def projected_limit(
    model: Noise, pairs: Pairs, pair: Tensor, head: Tensor | None, direction: Tensor, deviations: float
) -> tuple[Tensor, Tensor]:
    """(bias, random) limits [c] of Σ direction · error for candidates: direction [c, G, D], or of one `head` [c] alone.

    Every channel of a head shares the rounding of a weight, and tokens of one bin round alike: both are in the variance.
    Heads with the same query err alike as well.
    """

    def take(x: Tensor) -> Tensor:
        return x[pair] if head is None else x[pair, head][:, None]

    if head is not None:
        direction = direction[torch.arange(len(pair), device=pair.device), head][:, None]
    along = direction @ pairs.v[pair].mT  # [c, G, n]
    scale = (take(model.token_variance).sqrt() * take(model.weight)).to(along.dtype)
    shifted = along - (direction * take(model.o)).sum(-1, keepdim=True)
    plain, other = scale * along, scale * shifted
    coherence = take(model.coherence)
    if (coherence > SCATTERED).any():
        # Tied tokens round alike for certain, which bounds the sum; near ones perhaps, which only its variance must cover.
        near, ties = (tuple(_joined(x, take(bin_)) for x in (plain, other)) for bin_ in model.bins)
        ways, factor = (*near, *ties), torch.ones_like(coherence)
    else:
        ways = ties = (plain, other)
        factor = coherence.clamp(min=1)
    tokens = (torch.stack([x.square().sum(-1) for x in ways]).amax(0) * factor).sum(-1)  # [c]
    most = math.sqrt(3) * torch.maximum(*(x.abs().sum(-1) for x in ties)).sum(-1)
    own = (direction.square() * (take(model.own) + take(model.half).square() / 3)).sum((-2, -1))
    if head is None:
        q = pairs.q[pair]
        alike = (q[:, :, None] == q[:, None]).all(-1).sum(-1).amax(-1)
        tokens, own = tokens * alike, own * alike
    random = torch.minimum(deviations * (tokens + own).sqrt(), most + deviations * own.sqrt())
    bias = (direction.abs() * take(model.bias - model.leant)).sum((-2, -1))
    if model.leaning is not None:  # a weight's own error is the same in all channels
        bias = bias + (take(model.leaning) * shifted.abs()).sum((-2, -1))
    return bias, random


def _joined(terms: Tensor, bin_: Tensor) -> Tensor:
    """The sum of each bin, in the place of its rank: [c, G, n]."""
    return torch.zeros_like(terms).scatter_add_(-1, ranks(bin_), terms)


def row_limit(residue: Residue, model: Noise, pairs: Pairs, surprise: float) -> tuple[Tensor, Tensor]:
    """(rms(err/σ), its limit) of each row [P, G], after the part of each error that bias explains is taken off."""
    excess = (residue.error.abs() - model.bias).clamp(min=0)
    weighed = residue.precision > 0
    count = weighed.sum(-1).clamp(min=1).float()
    total = (excess.square() * residue.precision).sum(-1)
    # For independent channels: tr + 2 sqrt(tr(S²) x) + 2 |S| x with S = I (Hsu, Kakade & Zhang 2012).
    limit = count + 2 * (count * surprise).sqrt() + 2 * surprise
    suspects = (total > limit).flatten()
    if suspects.any():
        worst = (total / limit).flatten().topk(min(EXAMINED, suspects.numel())).indices
        worst = worst[suspects[worst]]
        pair, head = worst // total.shape[1], worst % total.shape[1]
        ways = [
            _quadratic_limit(residue, model, pairs, pair, head, bin_, shift, surprise)
            for bin_ in model.bins
            for shift in (False, True)
        ]
        exact = torch.stack(ways).amax(0)
        cleared = torch.minimum(total, limit)  # rows that were not examined do not count
        examined = torch.zeros_like(total, dtype=torch.bool)
        examined[pair, head] = True
        total = torch.where(examined, total, cleared)
        limit = limit.clone()
        limit[pair, head] = torch.maximum(exact, limit[pair, head])
    return (total / count).sqrt(), (limit / count).sqrt()


def _quadratic_limit(
    residue: Residue,
    model: Noise,
    pairs: Pairs,
    pair: Tensor,
    head: Tensor,
    bin_: Tensor,
    shift: bool,
    surprise: float,
) -> Tensor:
    """Limit [c] of Σ (err/σ)² with the correlation between channels that the weights' roundings make."""
    scale = (model.token_variance[pair, head].sqrt() * model.weight[pair, head])[..., None]  # [c, n, 1]
    v = pairs.v[pair] - model.o[pair, head][:, None] if shift else pairs.v[pair]
    terms = scale * v * residue.precision[pair, head].sqrt()[:, None]
    rank = ranks(bin_[pair, head])
    sums = torch.zeros_like(terms).scatter_add_(1, rank[..., None].expand_as(terms), terms)
    own = (model.own + model.half.square() / 3)[pair, head] * residue.precision[pair, head]
    spread = sums.mT @ sums + torch.diag_embed(own)  # [c, D, D]
    trace = spread.diagonal(dim1=-2, dim2=-1).sum(-1)
    largest = torch.linalg.eigvalsh(spread)[..., -1]
    limit: Tensor = trace + 2 * (spread.square().sum((-2, -1)) * surprise).sqrt() + 2 * largest * surprise
    return limit
