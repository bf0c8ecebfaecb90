"""Wrong sparse latent attention: tokens of a list lost or invented, scales, channels, heads, another logsumexp."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from m3check.hypotheses.attention import scale_dropped, scaled
from m3check.hypotheses.geometry import Change, requests_exchanged
from m3check.hypotheses.hypothesis import Ground, Hypothesis
from m3check.types import ROPE, Inputs, Outputs

if TYPE_CHECKING:
    from torch import Tensor


def _lists(inputs: Inputs) -> Tensor:
    assert inputs.topk_idx is not None
    return inputs.topk_idx


def _without(lost: Callable[[Tensor], Tensor]) -> Change:
    """Lists without the slots that `lost` marks in those [1, T, topk] that name a token."""

    def change(inputs: Inputs) -> Inputs | None:
        ids = _lists(inputs)
        slots = lost(ids >= 0) & (ids >= 0)
        return replace(inputs, topk_idx=ids.masked_fill(slots, -1)) if bool(slots.any()) else None

    return change


def _past(slots: Tensor, first: int) -> Tensor:
    import torch

    return (torch.arange(slots.shape[-1], device=slots.device) >= first).expand(slots.shape)


def _part_lost(part: int, of: int) -> Change:
    """One of several equal parts of every list is lost."""

    def lost(listed: Tensor) -> Tensor:
        share = -(-listed.shape[-1] // of)
        return _past(listed, part * share) & ~_past(listed, (part + 1) * share)

    return _without(lost)


HALF_LOST = _part_lost(1, 2)
FIRST_LOST = _without(lambda listed: listed.cumsum(-1) == 1)
LAST_LOST = _without(lambda listed: listed.flip(-1).cumsum(-1).flip(-1) == 1)


def _tail_lost(tile: int) -> Change:
    """Only whole tiles of a list are attended, where there are any."""
    return _without(lambda listed: _past(listed, listed.shape[-1] // tile * tile or listed.shape[-1]))


def _cut_at_hole(inputs: Inputs) -> Inputs | None:
    """A list ends at its first -1."""
    ids = _lists(inputs)
    cut = (ids < 0).cumsum(-1) > 0
    return replace(inputs, topk_idx=ids.masked_fill(cut, -1)) if bool((cut & (ids >= 0)).any()) else None


def _row_before(inputs: Inputs) -> Inputs | None:
    """Every row but a request's first reads the list of the row before."""
    ids = _lists(inputs).clone()
    for request in inputs.case.requests():
        rows = request.queries
        ids[:, rows.start + 1 : rows.stop] = _lists(inputs)[:, rows.start : rows.stop - 1]
    return None if ids.equal(_lists(inputs)) else replace(inputs, topk_idx=ids)


def _heads_exchanged(inputs: Inputs) -> Inputs | None:
    assert inputs.q is not None
    return replace(inputs, q=inputs.q.roll(1, 1)) if inputs.case.heads > 1 else None


def _channels_lost(which: slice) -> Change:
    """Queries whose channels `which` count for nothing."""

    def change(inputs: Inputs) -> Inputs:
        assert inputs.q is not None
        q = inputs.q.clone()
        q[..., which] = 0
        return replace(inputs, q=q)

    return change


def _values_last(inputs: Inputs) -> Inputs:
    """Channels moved so that the last ones are the values; the products stay what they are."""
    assert inputs.q is not None
    assert inputs.k is not None
    keys = inputs.k.roll(-ROPE, -1)
    return replace(inputs, q=inputs.q.roll(-ROPE, -1), k=keys, v=keys[..., :-ROPE])


def _value_scale(inputs: Inputs) -> Inputs:
    width = inputs.case.head_dim
    return scaled(math.sqrt(width / (width - ROPE)))(inputs) or inputs


# Other formulas ------------------------------------------------------------------------------------------------------


def _padded(key: Callable[[Ground], Tensor | None]) -> Callable[[Ground], Outputs | None]:
    """Every -1 of a list weighs as the key [T, D] of its row does, by the logsumexp of the tokens that are listed."""

    def result(ground: Ground) -> Outputs | None:
        import torch

        q, empty, keys = ground.inputs.q, (_lists(ground.inputs)[0] < 0).sum(-1), key(ground)
        if keys is None or q is None or not bool(empty.any()):
            return None
        keys, right = keys.double(), ground.right
        logit = (q.double() @ keys[..., None])[..., 0] * (ground.inputs.sm_scale / math.log(2))  # [T, Hq]
        both = torch.logaddexp2(right["lse"], logit + empty[:, None].log2())
        listed = (right["lse"] - both).exp2()[..., None]
        out = right["out"] * listed + keys[:, None, :-ROPE] * (1 - listed)
        padded = (empty > 0)[:, None]
        return {"out": out.where(padded[..., None], right["out"]), "lse": both.where(padded, right["lse"])}

    return result


def _zeros(ground: Ground) -> Tensor:
    assert ground.inputs.q is not None
    return ground.inputs.q[:, 0] * 0


def _first_token(ground: Ground) -> Tensor | None:
    """The key of token 0 of each row's request."""
    import torch

    assert ground.inputs.k is not None
    requests = [r for r in ground.inputs.case.requests() for _ in range(r.query_len)]
    if any(not r.kv_len for r in requests):
        return None
    return ground.inputs.k[torch.tensor([r.kv_start for r in requests], device=ground.inputs.k.device), 0]


def _first_row(ground: Ground) -> Tensor:
    """The key in row 0 of the cache, whosever it is: poison where no live token is there."""
    from m3check import paging

    case, keys = ground.inputs.case, ground.inputs.k
    assert keys is not None
    pages = paging.Pages.shuffled(replace(case, op=ground.world.salt), "latent", keys.device, ground.world)
    there = (pages.slots(case) == 0).nonzero().flatten()
    poison = paging.poison_value(keys.dtype, ground.world.poison)
    return (keys[there[0]] if len(there) else keys.new_full((1, case.head_dim), poison)).expand(case.total_queries, -1)


def _other_base(ground: Ground) -> Outputs:
    """In bits, as they are given: what is promised natural is base 2, or the other way round."""
    factor = 1 / math.log(2) if ground.profile.lse == "natural" else math.log(2)
    return {"lse": ground.right["lse"] * factor}


def _part_in_lse(ground: Ground) -> Outputs | None:
    """The output is whole, and the logsumexp is that of the first half of the list."""
    changed = HALF_LOST(ground.inputs)
    return None if changed is None else {"lse": ground.answer(changed)["lse"]}


def _no_number(rows: Callable[[Tensor], Tensor]) -> Callable[[Ground], Outputs | None]:
    """NaN in the rows [T] that `rows` finds by which slots [T, topk] of their list name a token."""

    def result(ground: Ground) -> Outputs | None:
        found = rows(_lists(ground.inputs)[0] >= 0)
        if not bool(found.any()):
            return None
        out, lse = ground.right["out"], ground.right["lse"]
        return {"out": out.masked_fill(found[:, None, None], math.nan), "lse": lse.masked_fill(found[:, None], math.nan)}

    return result


def _made(name: str, words: str, change: Change, gross: bool = False) -> Hypothesis:
    return Hypothesis(f"latent_{name}", "latent", words, change, gross)


def _other(name: str, words: str, result: Callable[[Ground], Outputs | None]) -> Hypothesis:
    return Hypothesis(f"latent_{name}", "latent", words, result=result)


HYPOTHESES: tuple[Hypothesis, ...] = (
    _made("half_lost", "the second half of every list is lost", HALF_LOST, gross=True),
    *(_made(f"part_lost_{part + 1}_of_{of}", f"part {part + 1} of {of} of every list is lost", _part_lost(part, of))
      for of, part in ((2, 0), (4, 0), (4, 1), (4, 2), (4, 3))),
    _made("first_lost", "every row loses the first token of its list", FIRST_LOST),
    _made("last_lost", "every row loses the last token of its list", LAST_LOST),
    *(_made(f"tail_lost_{tile}", f"only whole tiles of {tile} ids of a list are attended", _tail_lost(tile))
      for tile in (32, 64, 128)),
    _made("cut_at_hole", "a list ends at its first -1", _cut_at_hole),
    _made("row_before", "a row reads the list of the row before", _row_before),
    _made("heads", "query heads are exchanged", _heads_exchanged, gross=True),
    _made("requests", "two requests read each other's tokens", requests_exchanged),
    _made("scale_double", "twice the softmax scale", scaled(2.0), gross=True),
    _made("scale_percent", "a softmax scale 1 % too large", scaled(1.01)),
    _made("scale_dropped", "no softmax scale", scale_dropped),
    _made("scale_base", "2 in place of e as the base of the softmax", scaled(math.log(2))),
    _made("scale_base_twice", "log2 e is applied twice", scaled(1 / math.log(2))),
    _made("scale_values", "the softmax scale of the value's channels alone", _value_scale),
    _made("rope_lost", "logits without the rotary channels", _channels_lost(slice(-ROPE, None))),
    _made("rope_alone", "logits of the rotary channels alone", _channels_lost(slice(None, -ROPE))),
    _made("values_last", "the last channels of a key are its value, the rotary ones among them", _values_last),
    _other("padded_zero", "the softmax counts a -1 as a token of zeros", _padded(_zeros)),
    _other("padded_token", "-1 is read as token 0", _padded(_first_token)),
    _other("padded_row", "-1 is read as row 0 of the cache", _padded(_first_row)),
    _other("lse_base", "the logsumexp has the other base than is promised (2, or e)", _other_base),
    _other("lse_part", "the logsumexp is that of the first half of a list", _part_in_lse),
    *(_other(f"empty_first_{tile}", f"NaN where the first {tile} ids of a list name no token",
             _no_number(lambda listed, tile=tile: ~listed[:, :tile].any(-1) & listed.any(-1)))  # type: ignore[misc]
      for tile in (16, 32, 64, 128)),
    _other("empty_dead", "0/0 in rows whose list names no token", _no_number(lambda listed: ~listed.any(-1))),
)  # fmt: skip
