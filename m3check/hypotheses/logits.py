"""Wrong indexer logits: scales, weights and queries of others, relu in another place, windows off, keys exchanged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from m3check.hypotheses import geometry
from m3check.hypotheses.geometry import Change
from m3check.hypotheses.hypothesis import Ground, Hypothesis
from m3check.hypotheses.inputs import TOP_LEFT
from m3check.types import Inputs, Outputs

if TYPE_CHECKING:
    from torch import Tensor


def _with(inputs: Inputs, name: str, value: Tensor) -> Inputs | None:
    """The inputs with another tensor in `more`; None where it is the one that stands there."""
    return None if value.equal(inputs.more[name]) else replace(inputs, more={**inputs.more, name: value})


def _scales(change: Callable[[Tensor], Tensor]) -> Change:
    """Scales [n] of each request's tokens, changed."""

    def changed(inputs: Inputs) -> Inputs | None:
        scale = inputs.more["key_scale"].clone()
        for request in inputs.case.requests():
            scale[request.tokens] = change(scale[request.tokens])
        return _with(inputs, "key_scale", scale)

    return changed


def _weights(change: Callable[[Tensor], Tensor]) -> Change:
    """Weights [T, H], changed."""
    return lambda inputs: _with(inputs, "weights", change(inputs.more["weights"]))


def _heads_lost(kept: slice) -> Change:
    def change(weights: Tensor) -> Tensor:
        found = weights * 0
        found[:, kept] = weights[:, kept]
        return found

    return _weights(change)


def _rows_rolled(queries: bool, weights: bool) -> Change:
    """Queries, weights or both of a request's next query."""

    def change(inputs: Inputs) -> Inputs | None:
        import torch

        assert inputs.idx_q is not None
        rows = torch.arange(inputs.case.total_queries, device=inputs.device)
        for request in inputs.case.requests():
            rows[request.queries] = rows[request.queries].roll(-1)
        if bool((rows == torch.arange(len(rows), device=rows.device)).all()):
            return None
        more = {**inputs.more, "weights": inputs.more["weights"][rows]} if weights else inputs.more
        return replace(inputs, idx_q=inputs.idx_q[rows] if queries else inputs.idx_q, more=more)

    return change


def _requests_exchanged(inputs: Inputs) -> Inputs | None:
    """The first and the last request read each other's keys, with their scales."""
    changed = geometry.requests_exchanged(inputs)
    scales = geometry.requests_exchanged(replace(inputs, idx_k=inputs.more["key_scale"]))
    if changed is None or scales is None or scales.idx_k is None:
        return None
    return replace(changed, more={**inputs.more, "key_scale": scales.idx_k})


def _softmax_scale(inputs: Inputs) -> Inputs | None:
    return _weights(lambda weights: weights * inputs.case.head_dim**-0.5)(inputs)


def _both_sides(sign: float) -> Change:
    """As many heads again that see the negative products, with `sign` times the weights: no relu at -1, magnitudes at 1."""

    def change(inputs: Inputs) -> Inputs:
        import torch

        assert inputs.idx_q is not None
        q, weights, case = inputs.idx_q.float(), inputs.more["weights"], inputs.case
        return replace(
            inputs,
            case=replace(case, gqa=2 * case.gqa),
            idx_q=torch.cat([q, -q], 1).to(inputs.idx_q.dtype),
            more={**inputs.more, "weights": torch.cat([weights, sign * weights], 1)},
        )

    return change


def _relu_last(inputs: Inputs) -> Inputs:
    """relu(w p) = |w| relu(sign(w) p)."""
    assert inputs.idx_q is not None
    weights = inputs.more["weights"]
    q = (inputs.idx_q.float() * weights.sign()[..., None]).to(inputs.idx_q.dtype)
    return replace(inputs, idx_q=q, more={**inputs.more, "weights": weights.abs()})


# Other formulas ------------------------------------------------------------------------------------------------------


def _relu_of_sum(ground: Ground) -> Outputs:
    without = ground.answer(_both_sides(-1.0)(ground.inputs) or ground.inputs)["logits"]
    return {"logits": without.clamp(min=0).where(ground.right["logits"].isfinite(), ground.right["logits"])}


def _heads_largest(ground: Ground) -> Outputs:
    """The largest of the heads' logits, worked out a head at a time."""
    heads = [_heads_lost(slice(h, h + 1))(ground.inputs) or ground.inputs for h in range(ground.inputs.case.heads)]
    found = ground.answer(heads[0])["logits"]
    for one in heads[1:]:
        found = found.maximum(ground.answer(one)["logits"])
    return {"logits": found}


def _unwritten(ground: Ground) -> Outputs:
    """What poisoned memory holds, in every cell that its row does not see; without pages a row ends with its request."""
    import torch

    right, case = ground.right["logits"], ground.inputs.case
    lengths = [r.kv_len if case.op == "mqa_logits" else case.context for r in case.requests() for _ in range(r.query_len)]
    there = torch.arange(case.context, device=right.device) < torch.tensor(lengths, device=right.device)[:, None]
    return {"logits": right.where(right.isfinite() | ~there, float("nan"))}


def _made(name: str, words: str, change: Change, gross: bool = False) -> Hypothesis:
    return Hypothesis(f"logits_{name}", "logits", words, change, gross)


HYPOTHESES: tuple[Hypothesis, ...] = (
    _made("scale_before", "each scale is that of the token before", _scales(lambda s: s.roll(1)), gross=True),
    _made("scale_after", "each scale is that of the token after", _scales(lambda s: s.roll(-1))),
    _made("scale_lost", "no scale is applied", _scales(lambda s: s * 0 + 1)),
    _made("scale_first", "every scale is that of a request's first token", _scales(lambda s: s[:1].expand(s.shape))),
    _made("weights_lost", "no weights are applied", _weights(lambda w: w * 0 + 1)),
    _made("weights_heads", "heads' weights are rolled by one", _weights(lambda w: w.roll(1, 1)), gross=True),
    _made("weights_rows", "weights are those of the next query", _rows_rolled(queries=False, weights=True)),
    _made("weights_scaled", "the weights carry a softmax scale", _softmax_scale),
    _made("first_head", "the first head alone is counted", _heads_lost(slice(0, 1))),
    _made("last_head_lost", "the last head is lost", _heads_lost(slice(0, -1))),
    _made("second_half_lost", "the second half of the heads is lost",
          lambda inputs: _heads_lost(slice(0, -(-inputs.case.heads // 2)))(inputs)),
    _made("queries", "a row holds the logits of the next query", _rows_rolled(queries=True, weights=True)),
    _made("requests", "two requests read each other's keys", _requests_exchanged),
    _made("dialect", "keys are read in the other fp8 dialect", geometry.other_dialect),
    _made("own_lost", "the window is one token short", geometry.EARLIER),
    _made("next_seen", "the window is one token long", geometry.LATER),
    _made("unmasked", "every row sees its request to the end", geometry.UNMASKED),
    _made("last_lost", "the last token of a request is lost", geometry.LAST_LOST),
    _made("top_left", "queries stand at the start of their request", TOP_LEFT),
    _made("drafts_lost", "lengths without the draft tokens", geometry.DRAFTS_LOST),
    _made("relu_lost", "no relu: negative products count", _both_sides(-1.0)),
    _made("relu_magnitude", "magnitudes in place of relu", _both_sides(1.0)),
    _made("relu_weighed", "relu after the weights", _relu_last),
    Hypothesis("logits_relu_sum", "logits", "relu of the sum over heads", _both_sides(-1.0), result=_relu_of_sum),
    Hypothesis("logits_heads_largest", "logits", "the largest head in place of their sum", result=_heads_largest),
    _made("heads_mean", "the mean over heads in place of their sum",
          lambda inputs: _weights(lambda w: w / w.shape[1])(inputs)),
    Hypothesis("logits_unwritten", "logits", "cells that a row does not see are not written", result=_unwritten),
)  # fmt: skip
