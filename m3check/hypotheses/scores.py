"""Wrong block scores and wrong selections."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from m3check.hypotheses.geometry import Change, next_block, positions
from m3check.types import BLOCK, Inputs, blocks

if TYPE_CHECKING:
    from torch import Tensor


def block_shifted(inputs: Inputs) -> Inputs | None:
    """A block gets the score of the next one."""
    assert inputs.idx_k is not None
    return replace(inputs, idx_k=next_block(inputs.idx_k, inputs.case)) if inputs.case.context > BLOCK else None


def best_key_lost(inputs: Inputs) -> Inputs | None:
    """One key, the best of a block for the last row of a request, is read as its neighbour in the block."""
    q, keys, case = inputs.idx_q, inputs.idx_k, inputs.case
    assert q is not None
    assert keys is not None
    changed = keys.clone()
    found = False
    for request in case.requests():
        first = request.kv_start + (blocks(request.kv_len) - 1) // 2 * BLOCK
        last = min(first + BLOCK, request.kv_start + request.kv_len)
        if not request.query_len or not request.kv_len or last - first < 2:
            continue
        best = int((keys[first:last].double() @ q[request.queries][-1, 0].double()).argmax())
        changed[first + best] = keys[first + (best - 1 if best else 1)]
        found = True
    return replace(inputs, idx_k=changed) if found else None


def head_shared(inputs: Inputs) -> Inputs | None:
    """Every index head scores with the queries of the first."""
    q = inputs.idx_q
    assert q is not None
    return replace(inputs, idx_q=q[:, :1].expand(q.shape).contiguous()) if q.shape[1] > 1 else None


def scores_scaled(inputs: Inputs) -> Inputs:
    """Scores carry the softmax scale, which belongs to attention."""
    assert inputs.idx_q is not None
    return replace(inputs, idx_q=inputs.idx_q.double() * inputs.sm_scale)


def forcing_lost(kind: str) -> Change:
    """No forced blocks of one kind: `init_blocks` or `local_blocks` is 0."""

    def change(inputs: Inputs) -> Inputs | None:
        case = inputs.case
        if not getattr(case, kind):
            return None
        none = replace(case, init_blocks=0) if kind == "init_blocks" else replace(case, local_blocks=0)
        return replace(inputs, case=none)

    return change


def forced_cells(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """(visible, init, local) bool [T, K] of the scores' cells; a block that is both init and local is local."""
    import torch

    scores, case = inputs.scores, inputs.case
    assert scores is not None
    block = torch.arange(scores.shape[-1], device=scores.device)
    visible = torch.tensor([blocks(p + 1) for p in positions(case)], dtype=torch.int64, device=scores.device)[:, None]
    seen = block < visible
    local = seen & (block >= visible - case.local_blocks)
    return seen, seen & (block < case.init_blocks) & ~local, local


def comparable(scores: Tensor) -> Tensor:
    """Scores in fp64, NaN below -inf, both finite."""
    return scores.double().nan_to_num(nan=-1e301, posinf=1e300, neginf=-1e300)


def merits(inputs: Inputs, ids: Tensor) -> Tensor:
    """What the ids [H, T, topk] are worth, in order of worth: lists of equal merits are equally right."""
    import torch

    assert inputs.scores is not None
    _, init, local = forced_cells(inputs)
    worth = comparable(inputs.scores).masked_fill(init, 2e305).masked_fill(local, 1e305)
    worth = torch.nn.functional.pad(worth, (0, 1), value=-2e305)  # an unused slot
    unused = worth.shape[-1] - 1
    return worth.gather(-1, ids.where((ids >= 0) & (ids < unused), unused).long()).sort(-1).values


def exchanged(out: Callable[[Tensor], Tensor], into: Callable[[Tensor, Tensor], Tensor]) -> Change:
    """Of the blocks that nothing forces, a chosen one is left out (its score is NaN) and another taken (its score is +inf).

    `out(chosen)` and `into(chosen, all)` name their ranks from how many are chosen and how many there are, each [T, 1].
    Rows where the two scores are equal stay as they are: either choice is right there.
    """

    def change(inputs: Inputs) -> Inputs | None:
        import torch

        scores = inputs.scores
        assert scores is not None
        heads, _, columns = scores.shape
        seen, init, local = forced_cells(inputs)
        free = seen & ~init & ~local  # [T, K]
        chosen = seen.sum(-1, keepdim=True).clamp(max=inputs.case.topk) - (init | local).sum(-1, keepdim=True)
        every = free.sum(-1, keepdim=True)
        value = comparable(scores).masked_fill(~free, -torch.inf)
        order = value.argsort(dim=-1, descending=True, stable=True)
        one, two = (
            order.gather(-1, rank.clamp(0, columns - 1).expand(heads, -1, -1))
            for rank in (out(chosen), into(chosen, every))
        )
        better = value.gather(-1, one) > value.gather(-1, two)
        swap = (chosen > 0) & (every > chosen) & better  # [H, T, 1]
        if not swap.any():
            return None
        changed = scores.scatter(-1, one, torch.nan).scatter(-1, two, torch.inf)
        return replace(inputs, scores=torch.where(swap, changed, scores))

    return change


best_for_worst = exchanged(lambda chosen: 0 * chosen, lambda chosen, every: every - 1)
neighbours = exchanged(lambda chosen: chosen - 1, lambda chosen, every: chosen)


def one_less(inputs: Inputs) -> Inputs:
    """One block less than topk."""
    return replace(inputs, case=replace(inputs.case, topk=inputs.case.topk - 1))


def heads_rolled(inputs: Inputs) -> Inputs | None:
    """An index head gets the selection of its neighbour."""
    assert inputs.scores is not None
    return replace(inputs, scores=inputs.scores.roll(1, 0)) if len(inputs.scores) > 1 else None


def columns_shifted(inputs: Inputs) -> Inputs | None:
    """The score of block b stands for block b + 1."""
    assert inputs.scores is not None
    return replace(inputs, scores=inputs.scores.roll(1, -1)) if inputs.scores.shape[-1] > 1 else None


def smallest_first(inputs: Inputs) -> Inputs:
    """The blocks of smallest score are selected."""
    assert inputs.scores is not None
    return replace(inputs, scores=-inputs.scores)
