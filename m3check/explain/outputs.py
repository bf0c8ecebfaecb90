"""A failing call of an op beside block-sparse attention taken apart: it has no stages, but outputs with rows and causes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from m3check.explain import likeness, pattern, places
from m3check.types import Status

if TYPE_CHECKING:
    from torch import Tensor

    from m3check.explain import Explanation
    from m3check.explain.stages import Trouble


def fill(found: Explanation, trouble: Trouble, width: int, told: Callable[[str], None]) -> None:
    """What is wrong with which outputs, which rows it strikes, where it is worst, and which hypotheses give it."""
    from m3check import runner

    case = trouble.inputs.case
    judge = runner.Judge(trouble.inputs, trouble.setting)
    red = [finding.check for finding in judge(trouble.inputs, trouble.run) if finding.status is Status.FAILED]
    call = judge.call(trouble.world)
    found.stage = case.op
    found.stages = [(case.op, f"guilty: {'; '.join(dict.fromkeys(red))}" if red else "right")]
    ratios = call.ratios()
    bad = {name: ratio for name, ratio in ratios.items() if bool((ratio > 1).any())}
    if bad:
        rows = [mask if mask.dim() == 2 else mask[:, None] for name, mask in call.wrong(ratios).items() if name in bad]
        found.pattern = pattern.described(case, rows[0].T if len(rows) == 1 else _any(rows))
        found.worst = _worst(call, bad)
        found.heat = _heat(call, bad, width)
    told("hypotheses")
    found.explained = [
        [(match.hypothesis.name, match.hypothesis.words, "") for match in group]
        for group in likeness.classes(likeness.matches(call), call)
    ]


def _any(rows: list[Tensor]) -> Tensor:
    """Bool [1, T] of rows with a wrong unit in any of several outputs."""
    import torch

    return torch.stack([mask.any(-1) for mask in rows]).any(0)[None]


def _worst(call: likeness.Call, bad: dict[str, Tensor]) -> list[str]:
    """The worst cells of the outputs: where, given, wanted, by how many times their bound."""
    from m3check.checks.outputs import OUTPUTS

    rows, right = pattern.rows_of(call.problem.case), call.given(call.problem, call.expected)
    lines = []
    for name, ratio in bad.items():
        if name not in right:
            continue
        flat = ratio.flatten()
        for place in flat.topk(min(places.WORST, flat.numel())).indices.tolist():
            if float(flat[place]) <= 1:
                break
            index = places.unravel(place, ratio.shape)
            row = rows[index[0]]
            if OUTPUTS[name].rows == 1:  # its heads stand first, and the chart's rows
                index = (index[1], index[0], *index[2:])
            times = f", {float(flat[place]):.3g} times its bound" if math.isfinite(flat[place]) else ""
            where = OUTPUTS[name].place.format(*index)
            given, wanted = (f"{float(held[name][index]):.6g}" for held in (call.run.outputs, right))
            if name == "ids":  # judged as a list
                where = f"index head {index[0]}"
                given, wanted = (str(held[name][index[:2]].tolist()) for held in (call.run.outputs, right))
            where = f"request {row.request.index}, token {row.position}, {where}"
            lines.append(f"`{name}` of {where}: {given} instead of {wanted}{times}")
    return lines[: places.WORST]


HEADS = {"idx_q": "index heads", "idx_k": "index key", "k": "kv heads", "cached_k": "kv heads", "cached_v": "kv heads",
         "logits": "tokens", "pages": "cells", "ids": "index heads"}  # fmt: skip
"""What the columns of an output's map are; query heads of all others."""


def _heat(call: likeness.Call, bad: dict[str, Tensor], width: int) -> list[str]:
    """A map of rows and heads, or tokens, for the output with the most wrong cells."""
    name = max(bad, key=lambda name: float((bad[name] > 1).double().mean()))
    ratio = bad[name]
    cells = ratio.amax(-1) if ratio.dim() == 3 else ratio.reshape(len(ratio), -1)
    return places.by_row(call.problem.case, cells, f"`{name}`, {HEADS.get(name, 'query heads')}", max(8, width - 28))
