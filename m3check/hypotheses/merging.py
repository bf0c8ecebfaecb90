"""Parts of a list joined wrongly: another base, no weights, a running maximum that is forgotten, empty parts.

A part is a run of slots. Each slot's attention is asked of the reference by itself; parts of any length follow from those.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from m3check.hypotheses.scene import Scene
from m3check.types import BLOCK, Inputs

if TYPE_CHECKING:
    from torch import Tensor

STEEP = 2.0**24
"""A softmax this many times steeper has its maximum for its log-sum-exp."""


@dataclass(frozen=True)
class Parts:
    """Attention by parts: fp64, C parts of each row."""

    out: Tensor  # [C, T, Hq, D]
    lse: Tensor  # [C, T, Hq] log2 of the sum of weights; -inf of an empty part
    top: Tensor  # [C, T, Hq] the largest base-2 logit


@lru_cache(maxsize=2)
def _slots(scene: Scene) -> Parts:
    """One part for each slot."""
    import torch

    ids = scene.problem.topk_idx
    assert ids is not None
    outs, lses, tops = [], [], []
    for slot in range(ids.shape[-1]):
        alone = replace(scene.problem, topk_idx=ids[..., slot : slot + 1])
        answer = scene.answer(alone)
        steep = scene.answer(replace(alone, sm_scale=alone.sm_scale * STEEP))
        outs.append(answer["out"])
        lses.append(answer["lse"])
        tops.append(steep["lse"] / STEEP)
    return Parts(torch.stack(outs), torch.stack(lses), torch.stack(tops))


def parts(scene: Scene, share: int) -> Parts:
    """Parts of `share` slots each, rightly summed."""
    import torch

    slots = _slots(scene)
    outs, lses, tops = [], [], []
    for start in range(0, len(slots.out), share):
        part = slice(start, start + share)
        lse = _log2_sum(slots.lse[part])
        weight = _weights(slots.lse[part], lse)
        outs.append((slots.out[part] * weight[..., None]).sum(0))
        lses.append(lse)
        tops.append(slots.top[part].amax(0))
    return Parts(torch.stack(outs), torch.stack(lses), torch.stack(tops))


def _log2_sum(lse: Tensor) -> Tensor:
    top = lse.amax(0)
    safe = top.masked_fill(top == -math.inf, 0)
    return safe + (lse - safe).exp2().sum(0).log2()


def _weights(lse: Tensor, total: Tensor) -> Tensor:
    return (lse - total.masked_fill(total == -math.inf, 0)).exp2()


def joined(weights: Callable[[Parts], Tensor], share: int) -> Callable[[Scene], Tensor | None]:
    """Parts of `share` slots under wrong weights [C, T, Hq]."""

    def result(scene: Scene) -> Tensor | None:
        ids = scene.problem.topk_idx
        assert ids is not None
        if not 0 < share < ids.shape[-1]:
            return None
        cut = parts(scene, share)
        weight = weights(cut).masked_fill(cut.lse == -math.inf, 0)
        total = weight.sum(0)
        out: Tensor = (cut.out * weight[..., None]).sum(0) / total.masked_fill(total == 0, 1)[..., None]
        return out

    return result


def _relative(x: Tensor) -> Tensor:
    """Differences to the largest of the parts."""
    top = x.amax(0)
    return x - top.masked_fill(top == -math.inf, 0)


def tops_by_e(cut: Parts) -> Tensor:
    """Sums are rescaled by e^(difference of base-2 maxima)."""
    return _relative(cut.top).exp() * (cut.lse - cut.top.masked_fill(cut.top == -math.inf, 0)).exp2()


def lse_by_e(cut: Parts) -> Tensor:
    """e^lse of a base-2 lse."""
    return _relative(cut.lse).exp()


def natural_lse(cut: Parts) -> Tensor:
    """2^lse of a natural lse."""
    return _relative(cut.lse * math.log(2)).exp2()


def unweighted(cut: Parts) -> Tensor:
    """Every part counts alike."""
    return (cut.lse > -math.inf).double()


def not_rescaled(cut: Parts) -> Tensor:
    """Each part keeps its own maximum."""
    return (cut.lse - cut.top.masked_fill(cut.top == -math.inf, 0)).exp2()


def last_maximum(cut: Parts) -> Tensor:
    """What was summed is not rescaled when the maximum grows."""
    import torch

    running = torch.cummax(cut.top, 0).values
    return (cut.lse - running.masked_fill(running == -math.inf, 0)).exp2()


def empty_first(share: int) -> Callable[[Scene], Tensor | None]:
    """NaN in rows whose first `share` slots hold no visible block."""

    def result(scene: Scene) -> Tensor | None:
        ids = scene.problem.topk_idx
        assert ids is not None
        if share > ids.shape[-1]:
            return None
        valid = _valid(scene.problem)
        bad = ~valid[..., :share].any(-1) & valid.any(-1)  # [H, T]
        return _nan(scene, bad)

    return result


def empty_any(share: int) -> Callable[[Scene], Tensor | None]:
    """NaN in rows of which any part of `share` slots holds no visible block."""

    def result(scene: Scene) -> Tensor | None:
        import torch

        valid = _valid(scene.problem)
        if share >= valid.shape[-1]:
            return None
        empty = [~valid[..., i : i + share].any(-1) for i in range(0, valid.shape[-1], share)]
        return _nan(scene, torch.stack(empty).any(0))

    return result


def dead_nan(scene: Scene) -> Tensor | None:
    """0/0 in rows that see no block."""
    return _nan(scene, ~_valid(scene.problem).any(-1))


def _valid(problem: Inputs) -> Tensor:
    import torch

    from m3check.hypotheses.geometry import positions

    ids = problem.topk_idx
    assert ids is not None
    position = torch.tensor(positions(problem.case), dtype=torch.int64, device=ids.device)[:, None]
    return (ids >= 0) & (ids * BLOCK <= position)


def _nan(scene: Scene, rows: Tensor) -> Tensor | None:
    """The right answer with NaN in rows [H, T]."""
    if not rows.any():
        return None
    heads = rows.T.repeat_interleave(scene.problem.case.gqa, 1)  # [T, Hq]
    return scene.right.masked_fill(heads[..., None], math.nan)
