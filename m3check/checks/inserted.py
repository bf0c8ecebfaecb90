"""What an insert wrote: every number within the bound of its norm and rotation and rounded once, wherever it went."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from m3check import paging
from m3check.checks.turning import Emission, Stored, Turned, explained, kept, turned
from m3check.checks.view import View
from m3check.types import Finding, Status

PLACES = {
    "q": "query head", "q_codes": "query head", "k": "kv head", "idx_q": "index head", "idx_k": "index key",
    "cached_k": "kv head", "cached_v": "kv head", "cached_idx_k": "index key",
}  # fmt: skip

EXPLAINED = 0.5
"""Share of wrong codes that one factor must explain to be named."""


def check_rows(view: View) -> list[Finding]:
    """Queries, keys and index heads, in the rows of the projection or in the buffers given for them."""
    return [_worst(view, "turned", [name for name in PLACES if not name.startswith("cached")])]


def check_cached(view: View) -> list[Finding]:
    """Keys, values and index keys at the slots of their tokens."""
    return [_worst(view, "inserted", [name for name in PLACES if name.startswith("cached")])]


def stored(view: View) -> dict[str, Stored]:
    """Each destination, cut to rows that have one."""
    if "stored" not in view.memo:
        dtypes, model = paging.stored(view.case), view.problem.more["x_q"].dtype
        right = expected(view)
        found = {}
        for name in PLACES:
            if name not in view.run.outputs:
                continue
            kind = {"q_codes": "q"}.get(name, name.removeprefix("cached_"))
            rows = kept(view.problem.more, name).to(view.device)
            part = Turned(right[kind].value[rows], right[kind].bound[rows])
            scale = float(view.problem.more["q_scale"]) if name == "q_codes" else 1.0
            found[name] = Stored(view.actual(name)[rows], part, dtypes[name], model, scale)
        view.memo["stored"] = found
    return view.memo["stored"]  # type: ignore[no-any-return]


def expected(view: View) -> dict[str, Turned]:
    """What the reference says of each kind of head, with its bound; values come unchanged."""
    more = view.problem.more
    angles = more["cos_sin"][more["positions"]].to(view.device)
    found = {}
    for kind in ("q", "k", "idx_q", "idx_k"):
        value = view.expected[kind].to(view.device)
        x, weight = more[f"x_{kind}"].to(view.device), more[f"w_{kind}"].to(view.device)
        found[kind] = turned(x, weight, angles, float(more["eps"]), value)
    value = view.expected["v"].to(view.device)
    found["v"] = Turned(value, torch.zeros_like(value))
    return found


def _worst(view: View, check: str, names: list[str]) -> Finding:
    """The element that needs the most of its bound, over some destinations."""
    here = {name: each for name, each in stored(view).items() if name in names}
    worst, measured = "", 0.0
    shares = explained(here, _rules(view))
    for name, used in shares.items():
        most = float(used.max()) if used.numel() else 0.0
        if most > measured or not worst:
            worst, measured = name, most
    if measured <= 1.0:
        return Finding(check, Status.PASSED, measured, 1.0, f"`{worst}`" if worst else "")
    used = shares[worst]
    row, head, channel = _place(used)
    actual, right = here[worst].actual[row, head, channel].item(), here[worst].turned.value[row, head, channel].item()
    told = kept(view.problem.more, worst).nonzero().flatten()
    where = f"`{worst}` of {view.rows.name(int(told[row]))}, {PLACES[worst]} {head}, channel {channel}"
    wrong = used > 1.0
    hint = (
        f"holds {actual:.6g}, wanted {right / here[worst].scale:.6g}; {int(wrong.sum())} of {used.numel()} numbers are off"
    )
    others = [name for name, each in shares.items() if name != worst and each.numel() and float(each.max()) > 1.0]
    if others:
        hint += f", and some of {', '.join(others)}"
    return Finding(check, Status.FAILED, measured, 1.0, where, hint)


def chart(view: View, name: str) -> Tensor:
    """[T, heads, D] of how much of its bound each number of one output needs; tokens without a slot need none."""
    rows = kept(view.problem.more, name).to(view.device)
    found = torch.zeros(view.actual(name).shape, dtype=torch.float64, device=view.device)
    found[rows] = explained({name: stored(view)[name]}, _rules(view))[name]
    return found


def _place(used: Tensor) -> tuple[int, int, int]:
    flat = int(used.argmax())
    heads, channels = used.shape[1:]
    return flat // (heads * channels), flat // channels % heads, flat % channels


def check_identity(view: View) -> list[Finding]:
    """fp8 caches hold numbers and not multiples of them: who reads an index cache does not multiply, and who reads the main
    cache multiplies by a scale that the layer keeps for itself, or not at all. What `inserted` passes passes here.
    """
    findings = []
    for name, each in stored(view).items():
        if each.dtype.itemsize > 1 or not name.startswith("cached") or not each.actual.numel():
            continue
        each = each.cut(each.turned.value.abs() < 0.9 * float(torch.finfo(each.dtype).max))  # the others are cut off
        tried = [(*found, rule) for rule in _rules(view) if (found := _factor(each, rule)) is not None]
        if not tried:
            continue
        factor, limit, rule = min(tried, key=lambda found: abs(found[0] - 1.0) - found[1])
        measured = abs(factor - 1.0)
        if measured <= limit:
            findings.append(Finding("identity", Status.PASSED, measured, limit, f"`{name}`"))
        elif _multiplied(each, factor, rule):
            hint = f"the cache holds {factor:.6g} times what it should: who reads it multiplies by 1, or by another scale"
            findings.append(Finding("identity", Status.FAILED, measured, limit, f"`{name}`", hint))
    return findings


def _factor(stored: Stored, rule: Emission) -> tuple[float, float] | None:
    """By what the nearest codes must be multiplied to give those that are there, and how far from 1 that may be.

    Not against the numbers before their rounding: fp8 errors of one sign are not as many and large as those of the other.
    """
    right = stored.emitted(0.0, rule)
    size = float(right.square().sum())
    if not size:
        return None
    room = torch.maximum(stored.emitted(1.0, rule) - right, right - stored.emitted(-1.0, rule))
    factor = float((right * stored.actual.double()).sum()) / size
    return factor, float((right.abs() * room).sum()) / size + 2.0**-40


def _multiplied(stored: Stored, factor: float, rule: Emission) -> bool:
    """Whether most of the wrong codes are nearest to their numbers times the factor. A few wrong ones, which change the
    factor as well, are not multiples: they are for `inserted` to tell.
    """
    if not math.isfinite(factor) or not factor:
        return False
    wrong = stored.cut(stored.actual.double() != stored.emitted(0.0, rule))
    found = replace(wrong, scale=wrong.scale / factor).emitted(0.0, rule)
    return bool((wrong.actual.double() == found).double().mean() > EXPLAINED)


def _rules(view: View) -> tuple[Emission, ...]:
    """The rules of emission that a kernel may follow."""
    emits = view.setting.profile.emits
    return ("direct", "rounded") if emits == "either" else (emits,)
