"""Tokens that a row must not see may hold anything: those after its position, and those of other requests."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from m3check.checks.invariants.trial import Trial
from m3check.paging import World, words
from m3check.types import Finding, Inputs

LARGEST = 1e4
"""Live tokens are perturbed finitely: a kernel may load them and give them no weight."""


def future(trial: Trial) -> list[Finding]:
    """Tokens after the first half of each request's queries become large; the rows of that half keep their bits."""
    case = trial.inputs.case
    rows = torch.zeros(case.total_queries, dtype=torch.bool)
    changed = torch.zeros(case.total_tokens, dtype=torch.bool)
    for request in case.requests():
        kept = max(1, request.query_len // 2)
        rows[request.query_start : request.query_start + min(kept, request.query_len)] = True
        if request.query_len > 1 and request.position(kept - 1) >= 0:
            changed[request.kv_start + request.position(kept - 1) + 1 : request.kv_start + request.kv_len] = True
        elif request.query_len > 1:
            rows[request.queries] = False
    device = next(iter(trial.first.outputs.values())).device
    inputs = _with_tokens(trial.inputs, changed.to(device), _large)
    change = "tokens after the queries' positions were changed"
    return [trial.same("future", change, trial.call(inputs, World()), rows=rows.to(device))]


def neighbours(trial: Trial) -> list[Finding]:
    """All of a batch but one request changes its contents; the rows of that one keep their bits."""
    case = trial.inputs.case
    live = [r for r in case.requests() if r.query_len and r.kv_len]
    kept = live[len(live) // 2]
    device = next(iter(trial.first.outputs.values())).device
    tokens = torch.ones(case.total_tokens, dtype=torch.bool, device=device)
    rows = torch.zeros(case.total_queries, dtype=torch.bool, device=device)
    tokens[kept.tokens], rows[kept.queries] = False, True
    inputs = _with_tokens(trial.inputs, tokens, _mixed)

    def queries(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else _mixed(tensor, ~rows)

    fresh = {name: _mixed(x, ~rows) if name.startswith("x_") and x.numel() else x for name, x in inputs.more.items()}
    inputs = replace(inputs, q=queries(inputs.q), idx_q=queries(inputs.idx_q), more=fresh)
    if inputs.scores is not None:
        visible = inputs.scores > -torch.inf
        inputs = replace(inputs, scores=torch.where(visible & ~rows[:, None], -inputs.scores, inputs.scores))
    change = f"the contents of every request but {kept.index} were changed"
    return [trial.same("neighbours", change, trial.call(inputs, World()), rows=rows)]


def _with_tokens(inputs: Inputs, which: Tensor, make: object) -> Inputs:
    """Inputs whose keys and values of `which` tokens [N] went through `make`."""
    assert callable(make)
    names = [name for name in ("idx_k", "k", "v") if getattr(inputs, name) is not None]
    return replace(inputs, **{name: make(getattr(inputs, name), which) for name in names})


def _large(tensor: Tensor, which: Tensor) -> Tensor:
    """±LARGEST, or the dtype's largest, in the chosen rows, the sign by row and channel."""
    size = min(LARGEST, float(torch.finfo(tensor.dtype).max))
    row = torch.arange(tensor.shape[0], device=tensor.device).view(-1, *[1] * (tensor.dim() - 1))
    channel = torch.arange(tensor.shape[-1], device=tensor.device)
    large = torch.where((row + channel) % 3 == 0, -size, size).expand(tensor.shape).to(tensor.dtype)
    return _chosen(which, large, tensor)


def _mixed(tensor: Tensor, which: Tensor) -> Tensor:
    """The chosen rows with their values in another order, and each in another row."""
    other = words(tensor).flip(0, -1).view(tensor.dtype)
    return _chosen(which, other, tensor)


def _chosen(which: Tensor, new: Tensor, old: Tensor) -> Tensor:
    where = which.view(-1, *[1] * (old.dim() - 1))
    return torch.where(where, words(new.contiguous()), words(old)).view(old.dtype)
