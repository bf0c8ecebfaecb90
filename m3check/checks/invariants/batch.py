"""Who else is in the batch, and in which order requests and heads stand, changes no row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from m3check.checks.invariants.regroup import Part, assembled, put_back, taken
from m3check.checks.invariants.trial import Trial, damage
from m3check.paging import Run, World
from m3check.types import OPS, Case, Finding, Inputs


def order(trial: Trial) -> list[Finding]:
    """The requests in reverse order, of a mixed batch those of each part; every row keeps its bits.

    Not of `mqa_logits`, whose keys are one tensor: they stand in other lanes of a tile then, which may add up otherwise.
    """
    case = trial.inputs.case
    requests = list(case.requests())
    mixed = OPS[case.op].phase == "mixed"
    first = case.decodes if mixed else 0
    parts = [Part.whole(request) for request in (*reversed(requests[:first]), *reversed(requests[first:]))]
    inputs, rows = assembled(trial.inputs, parts)
    run = put_back(trial.first.outputs, [(trial.call(inputs, World()), rows)])
    # A prefilled request may now be one of the decoded.
    alike = case.op != "mqa_logits" and (not mixed or inputs.case.decodes == first)
    return [trial.same("batch_order", "the requests stood in reverse order", run, bitwise=alike)]


def heads(trial: Trial) -> list[Finding]:
    """KV and index heads rotated by one, each with its query heads; summed heads, each with its weight."""
    inputs = trial.inputs
    case = inputs.case
    device = next(iter(trial.first.outputs.values())).device

    def rotated(count: int) -> torch.Tensor:
        return torch.arange(1, count + 1, device=device) % count

    turn = rotated(case.kv_heads)
    index = rotated(case.index_width if inputs.idx_q is None else inputs.idx_q.shape[1])
    lanes = (turn[:, None] * case.gqa + torch.arange(case.gqa, device=device)).flatten()
    by = {"idx_q": (1, index), "k": (1, turn), "v": (1, turn), "q": (1, lanes), "scores": (0, turn), "topk_idx": (0, turn)}
    by |= dict.fromkeys(("k_scale", "v_scale"), (1, turn))
    changed = {name: getattr(inputs, name) for name in by}
    turned: dict[str, Any] = {
        name: taken(tensor, by[name][1], by[name][0])
        for name, tensor in changed.items()
        if tensor is not None and tensor.dim() > 0
    }
    by = {"x_q": (1, lanes), "x_idx_q": (1, index), "weights": (1, index), "x_k": (1, turn), "x_v": (1, turn)}
    further = {
        name: taken(tensor, by[name][1], by[name][0]) if name in by and tensor.numel() else tensor
        for name, tensor in inputs.more.items()
    }
    run = trial.call(replace(inputs, more=further, **turned), World())
    back = {"score": (0, turn), "ids": (0, turn), **dict.fromkeys(("out", "q", "q_codes"), (1, lanes))}
    back |= {"idx_q": (1, index), **dict.fromkeys(("k", "cached_k", "cached_v"), (1, turn))}
    outputs = {
        name: taken(tensor, back[name][1].argsort(), back[name][0]) if name in back else tensor
        for name, tensor in run.outputs.items()
    }
    run = Run(outputs, run.guards, run.frozen, arithmetic=run.arithmetic)
    return [trial.same("head_order", "the heads stood in another order", run, bitwise=False)]


def alone(trial: Trial) -> list[Finding]:
    """One request of the batch without the others."""
    live = [r for r in trial.inputs.case.requests() if r.query_len and r.kv_len]
    request = live[-1]
    inputs, rows = assembled(trial.inputs, [Part.whole(request)])
    run = put_back(trial.first.outputs, [(trial.call(inputs, World()), rows)])
    return [trial.same("alone", f"request {request.index} was alone in its batch", run, bitwise=False)]


def padded(trial: Trial) -> list[Finding]:
    """Rows of length 0 before, between and after the requests, as a graph captured for more requests has them."""
    parts, keep = [], []
    for request in trial.inputs.case.requests():
        parts += [Part.whole(request), Part(request, 0, request.query_len, 0)]
        keep += [True] * request.query_len + [False] * request.query_len
    inputs, rows = assembled(trial.inputs, parts)
    rows = rows.where(torch.tensor(keep, device=rows.device), -1)
    run = put_back(trial.first.outputs, [(trial.call(inputs, World()), rows)])
    return [trial.same("padded", "padded rows of length 0 stood between the requests", run, bitwise=False)]


def all_padded(trial: Trial) -> list[Finding]:
    """The same queries, none of which sees a token: what such rows hold is judged as in any other batch."""
    decode = OPS[trial.inputs.case.op].phase == "decode"
    parts = []
    for request in trial.inputs.case.requests():
        if not decode:  # keys that no query sees
            parts.append(Part(request, 0, 0, request.kv_len))
        parts.append(Part(request, 0, request.query_len, 0))
    inputs, _ = assembled(trial.inputs, parts)
    if inputs.topk_idx is not None:  # what a selection leaves in such rows
        inputs = replace(inputs, topk_idx=torch.full_like(inputs.topk_idx, -1))
    return [trial.judged("all_padded", "no query saw a token", inputs, trial.call(inputs, World()))]


def empty(trial: Trial) -> list[Finding]:
    """No query at all: prefill requests without queries, or a decode batch of no requests."""
    case = trial.inputs.case
    decode = OPS[case.op].phase == "decode"
    parts = [] if decode else [Part(r, 0, 0, r.kv_len) for r in case.requests()]
    inputs, _ = assembled(trial.inputs, parts)
    words = "no request was in the batch" if decode else "no request had a query"
    broken = damage(trial.call(inputs, World()))
    if broken is None:
        return [trial.passed("empty")]
    return [trial.unless_promised(replace(broken, check="empty", hint=f"{words}: {broken.hint}"))]


def reordered(inputs: Inputs, dead: bool = False) -> Inputs:
    """The requests in reverse order, the shortest live one padded out where `dead`: other lengths for the same graph."""
    case: Case = inputs.case
    requests = list(reversed(list(case.requests())))
    victim = min((r for r in requests if r.kv_len), key=lambda r: r.kv_len)
    parts = [
        Part(r, 0, r.query_len, 0) if dead and r is victim and OPS[case.op].phase == "decode" else Part.whole(r)
        for r in requests
    ]
    made, _ = assembled(inputs, parts)
    if dead and "kept" in made.more:  # tokens of an insert that are padding now: they have no slot
        kept = torch.arange(made.case.total_queries, device=made.device) >= parts[0].stop
        made = replace(made, more={**made.more, **{name: made.more[name] & kept for name in ("kept", "kept_idx")}})
    return made
