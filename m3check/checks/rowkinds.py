"""Which rows of an attention input are dead, and which have an id list that the kernel accepts."""

from __future__ import annotations

import torch
from torch import Tensor

from m3check.checks.view import View


def valid_ids(view: View) -> Tensor:
    """[T, Hkv, topk] bool: ids of visible blocks, or of tokens; the others contribute nothing."""
    ids = view.attended.transpose(0, 1)
    return (ids >= 0) & (ids < view.listable[:, None, None])


def dead_rows(view: View) -> Tensor:
    """[T, Hkv] bool: rows that see no valid block."""
    if "dead" not in view.memo:
        view.memo["dead"] = ~valid_ids(view).any(-1)
    result: Tensor = view.memo["dead"]
    return result


def promised_rows(view: View) -> Tensor:
    """[T, Hkv] bool: rows whose id list is of a kind that the profile accepts (in a chain: all)."""
    accepted = view.setting.profile.id_lists
    ids, valid = view.attended.transpose(0, 1), valid_ids(view)
    promised = torch.ones(ids.shape[:2], dtype=torch.bool, device=ids.device)
    if view.problem.topk_idx is None:
        return promised
    count = view.listable.clamp(max=view.case.topk)[:, None]
    unseen = ids >= view.listable[:, None, None]
    slot = torch.arange(1, view.case.topk + 1, device=ids.device)
    last = (valid * slot).amax(-1, keepdim=True)
    kinds = {
        "future": unseen.any(-1),
        "holes": ((ids < 0) & (slot < last)).any(-1),
        "short": (valid | unseen).sum(-1) < count,
    }
    for kind, rows in kinds.items():
        if kind not in accepted:
            promised &= ~rows
    ascending = ~(valid[..., 1:] & (ids[..., 1:] <= ids[..., :-1])).any(-1)
    if "full" not in accepted:
        promised &= ascending if "ascending" in accepted else torch.zeros_like(promised)
    return promised
