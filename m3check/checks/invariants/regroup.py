"""The same queries asked in other company: batches put together from the requests of one, and results put back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from m3check.checks.invariants.trial import coarsest
from m3check.checks.outputs import OUTPUTS
from m3check.paging import Run, words
from m3check.types import Inputs, Request, blocks

BY_TOKEN = frozenset({"x_q", "x_k", "x_v", "x_idx_q", "x_idx_k", "positions", "kept", "kept_idx", "weights"})
"""What of `Inputs.more` has an entry for each query token."""


@dataclass(frozen=True)
class Part:
    """Queries `start` to `stop` of a request as a request of their own, which sees the first `kv_len` tokens."""

    request: Request
    start: int
    stop: int
    kv_len: int

    @classmethod
    def whole(cls, request: Request) -> Part:
        """A request as it is."""
        return cls(request, 0, request.query_len, request.kv_len)

    @classmethod
    def up_to(cls, request: Request, start: int, stop: int) -> Part:
        """Some queries of a request, with the tokens that the last of them sees."""
        return cls(request, start, stop, max(0, request.position(stop - 1) + 1))


def assembled(inputs: Inputs, parts: Sequence[Part], **fields: Any) -> tuple[Inputs, Tensor]:
    """(a batch of these parts, the row [T'] of the old batch that each of its rows was).

    `fields` are further changes of the case.
    """
    case = replace(
        inputs.case,
        query_lens=tuple(part.stop - part.start for part in parts),
        kv_lens=tuple(part.kv_len for part in parts),
        **fields,
    )
    device = inputs.device
    rows = _joined([range(p.request.query_start + p.start, p.request.query_start + p.stop) for p in parts], device)
    tokens = _joined([range(p.request.kv_start, p.request.kv_start + p.kv_len) for p in parts], device)

    def of(tensor: Tensor | None, which: Tensor) -> Tensor | None:
        return None if tensor is None else taken(tensor, which)

    def scale(tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None or not tensor.dim() else tensor[tokens]

    scores, ids = inputs.scores, inputs.topk_idx
    which = dict.fromkeys(BY_TOKEN, rows) | {"key_scale": tokens}
    made = replace(
        inputs,
        case=case,
        idx_q=of(inputs.idx_q, rows),
        idx_k=of(inputs.idx_k, tokens),
        scores=None if scores is None else scores[:, rows, : blocks(case.context)],
        q=of(inputs.q, rows),
        k=of(inputs.k, tokens),
        v=of(inputs.v, tokens),
        k_scale=scale(inputs.k_scale),
        v_scale=scale(inputs.v_scale),
        topk_idx=None if ids is None else ids[:, rows],
        more={name: tensor[which[name]] if name in which else tensor for name, tensor in inputs.more.items()},
    )
    return made, rows


def taken(tensor: Tensor, index: Tensor, dim: int = 0) -> Tensor:
    """Entries of one dimension, whatever the dtype: bits are copied, not values."""
    return words(tensor).index_select(dim, index).view(tensor.dtype)


def _joined(ranges: Sequence[range], device: torch.device) -> Tensor:
    return torch.tensor([i for r in ranges for i in r], dtype=torch.int64, device=device)


def put_back(first: Mapping[str, Tensor], runs: Sequence[tuple[Run, Tensor]]) -> Run:
    """The outputs of some regrouped runs at the rows that they came from; rows below 0 belong to nobody.

    Scores of fewer columns are filled up as `OUTPUTS` says: those columns are invisible to the rows.
    """
    outputs = {name: tensor.clone() for name, tensor in first.items()}
    total = Run(outputs, arithmetic=coarsest([run for run, _ in runs]))
    for run, rows in runs:
        total.guards += run.guards
        total.frozen += run.frozen
        there = (rows >= 0).nonzero().flatten()
        to = rows[there]
        for name, tensor in run.outputs.items():
            if name not in outputs:
                continue
            output = OUTPUTS[name]
            dim = output.rows
            part = tensor.index_select(dim, there).to(outputs[name].dtype)
            if output.fill is not None:
                missing = outputs[name].shape[-1] - part.shape[-1]
                part = torch.nn.functional.pad(part, (0, missing), value=output.fill)
            outputs[name].index_copy_(dim, to, part)
    return total
