"""The error model of attention: what rounding may do to each output element, for a chunk of (token, KV head) pairs.

A pair has G query heads, n gathered tokens and D channels. Values are divided by the largest |v| of their channel, so that
fp32 holds every square. docs/bounds.md derives each term.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from m3check.arch import Accumulator
from m3check.checks.bounds import EXP2_ERROR, FORMATS, LN2, LOG2E, U32, DotError, dot_error, half_ulp
from m3check.checks.setting import Setting
from m3check.checks.view import chunks
from m3check.types import BLOCK, DTYPES

SUBTILE = 32
"""Tokens of the smallest tile that an online softmax walks in (AMD's attention on gfx942)."""

SMALLEST = 16
"""The same for a list of tokens, of which a matrix instruction takes no fewer."""

CELLS = 16
"""Logits this fraction of a rounding cell apart are taken to round alike."""

TIE = 2.0**-20
"""Logits this far apart tie."""

FLUSHED = {torch.float16: 2.0**-25, torch.float8_e4m3fn: 2.0**-10}
"""Half the smallest subnormal: a weight below this part of the largest, which is 1, is lost (e4m3: if nobody scales it)."""

HEAVY = 32
"""Bins of a row whose sums are worked out exactly, the heaviest ones."""

SCATTERED = 2.0
"""Up to this much coherence the roundings of p are treated as independent, their variance multiplied by it."""


@dataclass(frozen=True)
class Pairs:
    """A chunk of (token, KV head) pairs: P of them."""

    q: Tensor  # [P, G, D] fp32
    k: Tensor  # [P, n, D] fp32
    v: Tensor  # [P, n, D] fp32, divided by `unit`
    v_abs: Tensor
    v_square: Tensor
    unit: Tensor  # [P, 1, D] fp64: the largest |v| of each channel
    attended: Tensor  # [P, n] bool
    there: Tensor  # [P, n] bool: tokens that exist, future ones included
    token: Tensor  # [P, n] int64: position in the request
    whole: bool  # all elements of q and k are integers
    subtile: int = SUBTILE  # tokens of the smallest tile that a kernel walks in
    listed: bool = False  # tokens in the order of a list, which have no blocks: runs of as many stand for them


@dataclass(frozen=True)
class Noise:
    """What correct arithmetic explains, in units of each channel's largest |v|; [P, G, D] unless said otherwise."""

    o: Tensor  # the attention itself, fp32
    weight: Tensor  # [P, G, n] ŵ, 0 where not attended
    seen_weight: Tensor  # [P, G, n] exp(s - lse) of every token that exists, future ones included, at most 1
    logit: Tensor  # [P, G, n] natural logits, 0 where not attended
    block_sum: Tensor  # [P, G, S, D] Σ ŵ v of each listed block
    bias: Tensor  # one-signed errors, worst case
    leaning: Tensor | None  # [P, G, n] one-signed error of each weight times ŵ, None where there is none
    leant: Tensor  # the part of `bias` that comes from `leaning`
    token_variance: Tensor  # [P, G, n] of the relative error of each weight
    bins: tuple[Tensor, Tensor]  # [P, G, n] int32: tokens of one bin round alike, by cells and by exact ties
    coherence: Tensor  # [P, G] how much that adds to Σ ŵ²
    from_tokens: Tensor  # variance through the weights
    own: Tensor  # variance of what is independent between channels, the final rounding apart
    most: Tensor  # what all random terms can do at most
    half: Tensor  # half an ulp of the result
    tilt: Tensor  # Σ ŵ (logit) (v - o): what a change of scale does

    @property
    def variance(self) -> Tensor:
        """σ² of an element."""
        return self.from_tokens + self.own + self.half.square() / 3


def noise(
    pairs: Pairs, expected: Tensor, dtype: torch.dtype, sm_scale: float, setting: Setting, deviations: float
) -> Noise:
    """The model for a chunk; `expected` [P, G, D] fp64 is the reference's output, `dtype` that of queries and outputs."""
    sums = dot_error(pairs.q, pairs.k, setting.dot, pairs.whole)
    logit = sums.value * sm_scale
    attended = pairs.attended[:, None]
    masked = logit.masked_fill(~attended, -math.inf)
    m = masked.amax(-1, keepdim=True)
    lse = m + (masked - m).exp().sum(-1, keepdim=True).log()
    weight = (masked - lse).exp()
    seen_weight = (logit - lse).clamp(max=0).exp() * pairs.there[:, None]
    logit = logit.masked_fill(~attended, 0)
    held = getattr(torch, DTYPES[setting.profile.queries]) if setting.profile.queries else dtype
    u = _weight_rounding(held, setting.pv)
    weight_bias, weight_deviation, weight_most = weight_errors(sums, logit, m, sm_scale)

    v = pairs.v
    blocks = weight.unflatten(-1, (-1, BLOCK)).transpose(1, 2) @ v.unflatten(1, (-1, BLOCK))  # [P, S, G, D]
    block_sum = blocks.transpose(1, 2)
    o = block_sum.sum(2)
    tilt = (weight * logit) @ v - o * (weight * logit).sum(-1, keepdim=True)
    sizes = weight.unflatten(-1, (-1, BLOCK)).transpose(1, 2) @ pairs.v_abs.unflatten(1, (-1, BLOCK))
    block_size, size = sizes.amax(1), sizes.sum(1)
    positive, negative = block_sum.clamp(min=0).sum(2), -block_sum.clamp(max=0).sum(2)
    partial = torch.maximum(positive, negative) + block_size  # no partial sum over blocks in any order is larger

    # independent errors of the weights, each shared by all channels of its token
    token_variance = u**2 / 3 + weight_deviation.square()
    # Near logits mostly round alike, yet the edge of a cell may part them: the worse of both counts everywhere.
    bins = _bins(logit, 2 * u / CELLS), _bins(logit, TIE)
    coherence = _coherence(bins[0], weight)
    from_tokens = _through_weights(token_variance.sqrt() * weight, bins, coherence, weight, pairs, o)
    random = weight * (u + weight_most)
    most = random @ pairs.v_abs + o.abs() * random.sum(-1, keepdim=True)

    tokens = pairs.attended.sum(-1)[:, None, None].float()
    steps = tokens / pairs.subtile + 1
    own, bias, pv_most = _summing(setting.pv, tokens + 2 * steps, partial, size, block_sum, sizes)
    if setting.profile.partials != "fp32":
        rounded = FORMATS[dtype].u
        own = own + rounded**2 / 3 * _worst_split(block_sum)
        most = most + rounded * block_sum.abs().sum(2)
    most = most + pv_most

    common = _normaliser(setting, m, lse, steps, tokens, deviations)
    bias = bias + common * o.abs() + 4 * U32 * tilt.abs()
    merge = LN2 * U32 * 4 * torch.maximum(lse.abs(), m.abs()) * LOG2E + 4 * EXP2_ERROR + common
    share = weight.unflatten(-1, (-1, BLOCK)).sum(-1)  # [P, G, S]
    bias = bias + merge * (block_sum - share[..., None] * o[:, :, None]).abs().sum(2)
    leaning, leant = None, torch.zeros_like(bias)
    if weight_bias is not None:
        leaning = weight * weight_bias
        leant = leaning @ pairs.v_abs + o.abs() * leaning.sum(-1, keepdim=True)
        bias = bias + leant
    if held in FLUSHED:
        flushed = torch.minimum(weight, FLUSHED[held] * weight.amax(-1, keepdim=True))
        bias = bias + flushed @ pairs.v_abs
    if setting.pv.operand_bits is not None:
        bias = bias + 2.0 ** (1 - setting.pv.operand_bits) * (size + o.abs())  # values are cut; so are weights, all one way

    spread = torch.minimum(deviations * (from_tokens + own).sqrt(), most) + bias
    half = half_ulp(expected.abs() + spread.double() * pairs.unit, dtype) / pairs.unit
    return Noise(
        o,
        weight,
        seen_weight,
        logit,
        block_sum,
        bias,
        leaning,
        leant,
        token_variance,
        bins,
        coherence,
        from_tokens,
        own,
        most,
        half.float(),
        tilt,
    )


def _weight_rounding(dtype: torch.dtype, pv: Accumulator) -> float:
    """u of the weights in the numerator: they have the queries' dtype, or what the instruction makes of it."""
    u = FORMATS[dtype].u
    return u if pv.operand_bits is None else max(u, 2.0 ** (1 - pv.operand_bits))


def weight_errors(sums: DotError, logit: Tensor, m: Tensor, sm_scale: float) -> tuple[Tensor | None, Tensor, Tensor]:
    """(bias, deviation, most) of the relative error of each weight, before p is rounded."""
    t, distance = logit.abs() * LOG2E, (logit - m).abs() * LOG2E
    steps = LN2 * U32 * (2 * t + 3 * distance) + EXP2_ERROR  # product, subtraction, exp2
    deviation = ((sm_scale * sums.deviation).square() + steps.square() / 3).sqrt()
    bias = None if sums.bias is None else sm_scale * sums.bias
    return bias, deviation, sm_scale * sums.worst + steps


def _bins(logit: Tensor, width: float) -> Tensor:
    """The bin of each logit, int32."""
    # The offset keeps exact ties off the edges, where noise of the last bit would part them.
    return torch.floor(logit / max(width, TIE) + 0.381966).clamp(-(2**31), 2**31 - 128).int()


def coherence_of(logit: Tensor, u: float, weight: Tensor) -> Tensor:
    """[P, G] how much more than Σ ŵ² the weights add up to that a rounding of relative size `u` moves alike."""
    return _coherence(_bins(logit, 2 * u / CELLS), weight)


def _coherence(bin_: Tensor, weight: Tensor) -> Tensor:
    """Σ over bins of (Σ ŵ)², in units of Σ ŵ²: [P, G]; a hash table's collisions make it a little larger."""
    slots = 1 << (4 * bin_.shape[-1]).bit_length()
    hashed = (bin_ * 1640531527 >> 8) & (slots - 1)
    table = weight.new_zeros(*weight.shape[:-1], slots).scatter_add_(-1, hashed.long(), weight)
    return table.square().sum(-1) / weight.square().sum(-1).clamp(min=1e-30)


def ranks(bin_: Tensor) -> Tensor:
    """Bins [..., n] renumbered 0, 1, 2 … within each row, int64."""
    ordered, order = bin_.sort(dim=-1)
    step = torch.zeros_like(order)
    step[..., 1:] = (ordered[..., 1:] != ordered[..., :-1]).cumsum(-1)
    return torch.empty_like(order).scatter_(-1, order, step)


def _through_weights(
    scaled: Tensor, bins: Sequence[Tensor], coherence: Tensor, weight: Tensor, pairs: Pairs, o: Tensor
) -> Tensor:
    """Variance of Σ ε_j c_j v_j for c = `scaled` [P, G, n], tokens of one bin erring together.

    Where the rounded weights are also the ones that are summed, v - o takes the place of v: the larger of both counts.
    In rows with few coherent tokens a factor stands for them; in the others the heaviest bins are summed one by one.
    """
    v, v2 = pairs.v, pairs.v_square
    variance = _spread(scaled.square(), v, v2, o) * coherence.clamp(1, SCATTERED)[..., None]
    many = (coherence > SCATTERED).any(-1).nonzero().flatten()
    for part in chunks(len(many), max(1, 2**25 // (HEAVY * weight.shape[1] * weight.shape[2]))):
        pair = many[part]
        ways = [_together(scaled[pair], bin_[pair], weight[pair], v[pair], v2[pair], o[pair]) for bin_ in bins]
        variance[pair] = torch.stack(ways).amax(0)
    return variance


def _together(scaled: Tensor, bin_: Tensor, mass: Tensor, v: Tensor, v2: Tensor, o: Tensor) -> Tensor:
    """The same variance, the heaviest bins summed one by one: [p, G, D]."""
    rank = ranks(bin_)
    table = torch.zeros_like(mass).scatter_add_(-1, rank, mass)
    heavy, place = table.topk(min(HEAVY, table.shape[-1]), dim=-1)  # [p, G, M]
    member = rank[:, :, None] == place[..., None]  # [p, G, M, n]
    terms = member * scaled[:, :, None]
    sums = (terms.flatten(1, 2) @ v).unflatten(1, heavy.shape[1:])  # [p, G, M, D]
    shifted = sums - terms.sum(-1, keepdim=True) * o[:, :, None]
    rest = ~member.any(2)
    left = table.square().sum(-1) - heavy.square().sum(-1)
    factor = left / (mass.square() * rest).sum(-1).clamp(min=1e-30)
    light = _spread((scaled * rest).square(), v, v2, o) * factor.clamp(min=1)[..., None]
    return torch.maximum(sums.square().sum(2), shifted.square().sum(2)) + light


def _spread(squares: Tensor, v: Tensor, v2: Tensor, o: Tensor) -> Tensor:
    """The larger of Σ c² v² and Σ c² (v - o)²: [P, G, D] from c² [P, G, n]."""
    second, first, zeroth = squares @ v2, squares @ v, squares.sum(-1, keepdim=True)
    return second + (o.square() * zeroth - 2 * o * first).clamp(min=0)


def _summing(
    how: Accumulator, terms: Tensor, partial: Tensor, size: Tensor, block_sum: Tensor, block_size: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(variance, bias, most) of adding up p·v: roundings to nearest, or truncation in a matrix instruction.

    What truncation cuts off lies between 0 and one unit of the last place kept: half a unit of one sign, and a random
    half. Instructions add `inner` products to the running sum, whose size is bounded along the way.
    """
    if how.fraction_bits is None:
        zero = torch.zeros_like(partial)
        return U32**2 / 3 * terms * partial.square(), zero, terms * U32 * torch.maximum(partial, size)
    unit = 2.0 ** (1 - how.fraction_bits)
    steps = terms / how.inner + 1
    way = torch.minimum(steps * partial, _way(block_sum, block_size) * (BLOCK / how.inner) + partial)
    addends = how.inner + 1
    variance = steps * addends * (unit * partial).square() / 12
    return variance, (addends / 2 * unit + 2.0**-23) * way, addends / 2 * unit * way


def _way(block_sum: Tensor, block_size: Tensor) -> Tensor:
    """Bound on Σ over blocks of the running sum's size, whatever the order of blocks: [P, G, D].

    After r blocks the sum lies between those of the r smallest and of the r largest; within a block it moves by no more
    than the block's positive or negative products together. block_sum [P, G, S, D], block_size [P, S, G, D] of |products|.
    """
    ordered = block_sum.sort(dim=2).values
    low, high = ordered.cumsum(2), ordered.flip(2).cumsum(2)
    between = torch.maximum(high.abs(), low.abs()).sum(2)
    within = (block_size.transpose(1, 2) + block_sum.abs()).sum(2) / 2
    return between + within


def _worst_split(block_sum: Tensor) -> Tensor:
    """max over R = 1, 2, 4 … S equal splits of Σ (partial output)²: [P, G, D]."""
    worst = block_sum.sum(2).square()
    parts = block_sum
    while parts.shape[2] > 1:
        worst = torch.maximum(worst, parts.square().sum(2))
        if parts.shape[2] % 2:
            parts = torch.nn.functional.pad(parts, (0, 0, 0, 1))
        parts = parts[:, :, 0::2] + parts[:, :, 1::2]
    return worst


def _normaliser(setting: Setting, m: Tensor, lse: Tensor, steps: Tensor, tokens: Tensor, deviations: float) -> Tensor:
    """Relative error that all channels of a row share: of Σ p, or of 2^(m - lse) where lse is carried along."""
    summed = U32 * torch.minimum(tokens, deviations * (tokens / 3).sqrt())
    if setting.profile.normaliser == "sum":
        return summed + U32 * (2 * steps + 4)
    largest = torch.maximum(m.abs(), lse.abs()) * LOG2E
    return summed + LN2 * (steps + 2) * (U32 * largest + EXP2_ERROR) + steps * (EXP2_ERROR + 2 * U32)
