"""Wrong attention: blocks and tokens lost or exchanged, scales, heads, dequantisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from m3check.hypotheses.geometry import Change, next_block, positions
from m3check.types import BLOCK, Inputs, blocks

if TYPE_CHECKING:
    from torch import Tensor


def scaled(factor: float) -> Change:
    """Another softmax scale."""
    return lambda inputs: replace(inputs, sm_scale=inputs.sm_scale * factor)


def scale_dropped(inputs: Inputs) -> Inputs:
    """No softmax scale."""
    return replace(inputs, sm_scale=1.0)


# Lists ---------------------------------------------------------------------------------------------------------------


def _lists(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """(id lists [H, T, topk], which ids are of blocks that their row sees, position of each row [T, 1])."""
    import torch

    ids = inputs.topk_idx
    assert ids is not None
    position = torch.tensor(positions(inputs.case), dtype=torch.int64, device=ids.device)[:, None]
    return ids, (ids >= 0) & (ids * BLOCK <= position), position


def _without(inputs: Inputs, lost: Tensor) -> Inputs | None:
    """Lists without the slots `lost` [H, T, topk]."""
    assert inputs.topk_idx is not None
    return replace(inputs, topk_idx=inputs.topk_idx.masked_fill(lost, -1)) if lost.any() else None


def first_block_lost(inputs: Inputs) -> Inputs | None:
    """Every row loses the first visible block of its list."""
    _, valid, _ = _lists(inputs)
    return _without(inputs, valid & (valid.cumsum(-1) == 1))


def last_block_lost(inputs: Inputs) -> Inputs | None:
    """Every row loses the last visible block of its list."""
    _, valid, _ = _lists(inputs)
    return _without(inputs, valid & (valid.flip(-1).cumsum(-1).flip(-1) == 1))


def own_block_lost(inputs: Inputs) -> Inputs | None:
    """Every row that lists its own, partly filled block loses it."""
    ids, valid, position = _lists(inputs)
    return _without(inputs, valid & (ids == position // BLOCK))


def one_block_lost(inputs: Inputs) -> Inputs | None:
    """One row of one KV head loses one block."""
    import torch

    _, valid, _ = _lists(inputs)
    lost = torch.zeros_like(valid)
    live = valid[-1].any(-1).nonzero().flatten()
    if not len(live):
        return None
    row = int(live[len(live) // 2])
    slots = valid[-1, row].nonzero().flatten()
    lost[-1, row, slots[len(slots) // 2]] = True
    return _without(inputs, lost)


def block_replaced(inputs: Inputs) -> Inputs | None:
    """Every row that leaves visible blocks out reads one of those in place of the first listed one."""
    import torch

    ids, valid, position = _lists(inputs)
    columns = blocks(inputs.case.context)
    listed = torch.zeros(*ids.shape[:2], columns + 1, dtype=torch.bool, device=ids.device)
    listed.scatter_(2, ids.where(valid, columns).long(), True)
    free = ~listed[..., :columns] & (torch.arange(columns, device=ids.device) * BLOCK <= position)
    first = valid & (valid.cumsum(-1) == 1) & free.any(-1, keepdim=True)
    other = free.int().argmax(-1, keepdim=True).int()
    return replace(inputs, topk_idx=torch.where(first, other, ids)) if first.any() else None


def ids_clamped(inputs: Inputs) -> Inputs | None:
    """-1 is read as block 0, and a block out of sight as the query's own."""
    import torch

    ids, _, position = _lists(inputs)
    clamped = torch.minimum(ids.clamp(min=0), position.clamp(min=0) // BLOCK).int()
    live = (position >= 0).expand(ids.shape)  # a dead row has nothing to clamp to
    clamped = clamped.where(live, ids)
    return None if torch.equal(clamped, ids) else replace(inputs, topk_idx=clamped)


def lists_rolled(inputs: Inputs) -> Inputs | None:
    """A KV head reads the list of its neighbour."""
    ids, _, _ = _lists(inputs)
    return replace(inputs, topk_idx=ids.roll(1, 0)) if len(ids) > 1 else None


# Caches and heads ----------------------------------------------------------------------------------------------------


def values_of_next_block(inputs: Inputs) -> Inputs | None:
    """Keys of a block meet the values of the next one."""
    assert inputs.v is not None
    return replace(inputs, v=next_block(inputs.v, inputs.case)) if inputs.case.context > BLOCK else None


def kv_heads_rolled(inputs: Inputs) -> Inputs | None:
    """Every KV head reads its neighbour's keys and values."""
    assert inputs.k is not None
    assert inputs.v is not None
    return replace(inputs, k=inputs.k.roll(1, 1), v=inputs.v.roll(1, 1)) if inputs.k.shape[1] > 1 else None


def group_rolled(inputs: Inputs) -> Inputs | None:
    """Every query head of a group gets its neighbour's answer."""
    q, case = inputs.q, inputs.case
    assert q is not None
    rolled = q.unflatten(1, (case.kv_heads, -1)).roll(1, 2).flatten(1, 2)
    return replace(inputs, q=rolled) if case.gqa > 1 else None


# Tokens --------------------------------------------------------------------------------------------------------------

HIDDEN = -1e30
"""A logit that gives a token no weight."""


def token_lost(which: Callable[[Tensor, Tensor], Tensor]) -> Change:
    """The last row of each request loses one token in each KV head.

    `which` chooses it by the weights [n] and the positions [n] of the row's tokens. One more channel hides the token from
    that row alone: 1 in the row's queries, HIDDEN in the token's key, 0 everywhere else.
    """

    def change(inputs: Inputs) -> Inputs | None:
        import torch

        assert inputs.q is not None
        assert inputs.k is not None
        assert inputs.v is not None
        q, k, v = (torch.nn.functional.pad(x.double(), (0, 1)) for x in (inputs.q, inputs.k, inputs.v))
        ids, valid, _ = _lists(inputs)
        case, found = inputs.case, False
        for request in case.requests():
            row = request.query_start + request.query_len - 1
            for head in range(case.kv_heads if request.query_len and request.kv_len else 0):
                listed = ids[head, row][valid[head, row]].long()
                token = (listed[:, None] * BLOCK + torch.arange(BLOCK, device=ids.device)).flatten()
                token = token[token < request.kv_len]
                if len(token) < 2:
                    continue
                group = slice(head * case.gqa, (head + 1) * case.gqa)
                logits = q[row, group, :-1] @ k[request.kv_start + token, head, :-1].T * inputs.sm_scale
                lost = which(logits.softmax(-1).mean(0), token)
                q[row, group, -1] = 1
                k[request.kv_start + lost, head, -1] = HIDDEN
                found = True
        return replace(inputs, q=q, k=k, v=v) if found else None

    return change


def median_weight(weight: Tensor, token: Tensor) -> Tensor:
    """The token of median weight."""
    return token[weight.median(0).indices]


def first_of_a_block(weight: Tensor, token: Tensor) -> Tensor:
    """The first token of a block in the middle of the list."""
    first = token[token % BLOCK == 0]
    return first[len(first) // 2]


# Dequantisation ------------------------------------------------------------------------------------------------------


def scales(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor] | None]) -> Change:
    """Other scales of keys and values, where there are any."""

    def changed(inputs: Inputs) -> Inputs | None:
        if inputs.k_scale is None or inputs.v_scale is None:
            return None
        other = change(inputs.k_scale, inputs.v_scale)
        return replace(inputs, k_scale=other[0], v_scale=other[1]) if other else None

    return changed


def _rolled(axis: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
    def change(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor] | None:
        return (k.roll(1, axis), v.roll(1, axis)) if k.dim() == 2 and k.shape[axis] > 1 else None

    return change


k_scale_dropped = scales(lambda k, v: (k * 0 + 1, v))
v_scale_dropped = scales(lambda k, v: (k, v * 0 + 1))
scales_swapped = scales(lambda k, v: (v, k))
scales_of_token = scales(_rolled(0))
scales_of_head = scales(_rolled(1))
