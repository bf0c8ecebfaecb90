"""Matched filters: for each named first-order defect, how strongly the error points its way, in standard deviations.

A defect d gives z = Σ err·d/σ² over the standard deviation of that sum. All tokens are tried at once by matrix products;
the few that stand out are judged again with the noise's correlations and biases (`projected_limit`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from m3check.checks.noise import Noise, Pairs
from m3check.checks.residue import EXAMINED, Residue, projected_limit
from m3check.types import BLOCK

LOUD = 0.6
"""Of the limit: below it the simple rule, which ignores the noise's correlations, stands as what was measured."""

CANCELLED = 1e-5
"""Of its terms: below it a sum of squares by fp32 matrix products is nothing but their rounding."""

ABSURD = 1000.0
"""Times its weight: a token so light that only this much of it could be seen is not looked for."""

WIDE = ("block", "run")
"""Kinds that are tried on block sums."""

EXPLAINED = 0.3
"""Share of the squared error above which a defect is said to be the cause."""


@dataclass(frozen=True)
class Match:
    """The defect that fits best so far."""

    kind: str  # token, block, run (of listed tokens), scale, factor
    z: float  # what is left after bias, in standard deviations
    limit: float
    amount: float  # fitted size: -1 is lost, +1 is doubled; of a scale, the relative change
    share: float  # of Σ (err/σ)², how much the defect explains
    row: int
    kv_head: int
    group: int | None  # query head within the group; None for the whole group
    token: int = 0  # position in the request, the block id, or a run's first token by its place among the listed

    @property
    def red(self) -> bool:
        """Whether noise cannot explain it."""
        return self.z > self.limit

    def place(self) -> str:
        """The token or block in words."""
        words = {"token": "token", "block": "block", "run": f"the {BLOCK} listed tokens from number"}
        return f", {words[self.kind]} {self.token}" if self.kind in words else ""

    def hint(self, position: int) -> str:
        """What the mistake looks like, for a query at `position`."""
        if self.kind == "scale":
            text = f"like a softmax scale off by {self.amount:+.3%}"
        elif self.kind == "factor":
            text = f"like an output off by a factor {1 + self.amount:.5f} (a value scale, or the normaliser)"
        elif self.kind == "token" and self.token > position:
            text = f"like token {self.token} attended, which is {self.token - position} past the query (causal mask)"
        else:
            what = "lost or masked" if self.amount < 0 else "counted twice"
            what = what if 0.5 < abs(self.amount) < 2 else f"given {1 + self.amount:.2f} times its weight"
            text = f"like{self.place().removeprefix(',')} {what}"
            if self.kind == "token" and self.token == position:
                text += ", the query's own (mask off by one?)"
        if self.share < EXPLAINED:
            text += f"; that explains {self.share:.0%} of the error only, so the cause may be another"
        return text


@dataclass(frozen=True)
class _Filter:
    """Statistics of one family of defects in a chunk, last axis the defects: [P, G, m]."""

    kind: str
    dot: Tensor  # Σ_d err·d/σ²
    size: Tensor  # Σ_d d²/σ²
    own: Tensor  # what the rounding of the defect's own weight adds to the variance of `dot`


def best_token(
    residue: Residue, model: Noise, pairs: Pairs, limit: float, rows: Tensor, heads: Tensor, before: Match | None
) -> Match | None:
    """The best match among single tokens and whole blocks, for a GQA group and for one head."""
    v, o, precision, error = pairs.v, model.o, residue.precision, residue.error
    weight = model.seen_weight
    pull = error * precision
    dot = weight * (pull @ v.mT - (pull * o).sum(-1, keepdim=True))
    second, first, zeroth = (
        precision @ pairs.v_square.mT,
        (precision * o) @ v.mT,
        (precision * o.square()).sum(-1, keepdim=True),
    )
    distance = (second - 2 * first + zeroth).clamp(min=0)
    along = torch.maximum((second - first).abs(), distance)
    own = model.token_variance * (model.weight * weight * along).square()
    distance = distance.where(distance > CANCELLED * (second + zeroth), 0)  # v is o, but for rounding
    tokens = _Filter("token", dot, weight.square() * distance, own)
    share = model.weight.unflatten(-1, (-1, BLOCK)).sum(-1)
    shift = model.block_sum - share[..., None] * o[:, :, None]  # [P, G, S, D]
    size = (shift.square() * precision[:, :, None]).sum(-1)
    blocks = _Filter("run" if pairs.listed else "block", (shift * pull[:, :, None]).sum(-1), size, torch.zeros_like(size))

    def direction(kind: str, pair: Tensor, place: Tensor) -> Tensor:
        if kind in WIDE:
            moved: Tensor = shift[pair, :, place] * precision[pair]
            return moved
        weighed = weight[pair, :, place][..., None]  # [c, G, 1]
        result: Tensor = weighed * (v[pair, place][:, None] - o[pair]) * precision[pair]
        return result

    best = before
    for family in (tokens, blocks):
        best = _search(family, direction, residue, model, pairs, limit, rows, heads, best)
    return best


def best_scale(
    residue: Residue, model: Noise, pairs: Pairs, limit: float, rows: Tensor, heads: Tensor, before: Match | None
) -> Match | None:
    """The best match among another softmax scale and a factor on the output."""
    best = before
    for kind, defect in (("scale", model.tilt), ("factor", model.o)):
        weighed = defect * residue.precision
        size = (weighed * defect).sum(-1, keepdim=True)
        family = _Filter(kind, (weighed * residue.error).sum(-1, keepdim=True), size, torch.zeros_like(size))
        best = _search(
            family, lambda _, pair, __, weighed=weighed: weighed[pair], residue, model, pairs, limit, rows, heads, best
        )
    return best


def _own(moved: Tensor, head: Tensor | None) -> Tensor:
    """[c, G, D] of a whole group, or [c, 1, D] of one head [c] alone."""
    return moved if head is None else moved[torch.arange(len(head), device=head.device), head][:, None]


def _search(  # type: ignore[no-untyped-def]
    family: _Filter, direction, residue: Residue, model: Noise, pairs: Pairs, limit: float, rows: Tensor, heads: Tensor,
    before: Match | None,
) -> Match | None:  # fmt: skip
    """The better of `before` and the family's best, groups and single heads."""
    group_size = family.dot.shape[1]
    views = [(family.dot.sum(1), family.size.sum(1), family.own.sum(1))]
    if group_size > 1:
        views.append((family.dot.flatten(0, 1), family.size.flatten(0, 1), family.own.flatten(0, 1)))
    best = before
    for single, (dot, size, own) in enumerate(views):
        telling = size > (limit / ABSURD) ** 2
        z = torch.where(telling, dot.abs() / (size + own).clamp(min=1e-30).sqrt(), 0)
        top = z.flatten().topk(min(EXAMINED, z.numel()))
        place = top.indices % z.shape[-1]
        line = top.indices // z.shape[-1]
        pair = line // group_size if single else line
        head = line % group_size if single else None
        if top.values[0] <= LOUD * limit:
            last = slice(0, 1)
            left, random = top.values[last] * limit, torch.full_like(top.values[last], limit * limit)
        else:
            moved = direction(family.kind, pair, place)
            # In units of its own size, and summed anew: fp32 squares of a small weight vanish, and what is left of v - o
            # by matrix products, where the two are nearly equal, is rounding.
            unit = _own(moved, head).abs().amax((-2, -1), keepdim=True).clamp(min=1e-38)
            along = (_own(moved / unit, head).double() * _own(residue.error[pair], head)).sum((-2, -1)).abs()
            bias, random = projected_limit(model, pairs, pair, head, moved / unit, limit)
            left = (along.to(bias.dtype) - bias).clamp(min=0)
            last = slice(0, len(pair))
        score = left / random.clamp(min=1e-30) * limit
        index = score.argmax()
        chosen = top.indices[last][index]
        error2 = residue.error.square() * residue.precision  # [P, G, D]
        energy = error2[pair[last][index]] if head is None else error2[pair[last][index], head[last][index]]
        amount = dot.flatten()[chosen] / size.flatten()[chosen].clamp(min=1e-30)
        share = dot.flatten()[chosen].square() / (size.flatten()[chosen] * energy.sum()).clamp(min=1e-30)
        values = [score[index], amount, share, pair[last][index], place[last][index], line[last][index] % group_size]
        z_, amount_, share_, pair_, place_, head_ = torch.stack([x.double() for x in values]).tolist()
        if best is None or z_ > best.z:
            slot = int(place_) * (BLOCK if family.kind in WIDE else 1)
            token = slot if family.kind == "run" else int(pairs.token[int(pair_), slot])
            best = Match(
                family.kind,
                z_,
                limit,
                amount_,
                min(share_, 1.0),
                int(rows[int(pair_)]),
                int(heads[int(pair_)]),
                int(head_) if single else None,
                token // BLOCK if family.kind == "block" else token,
            )
    return best
