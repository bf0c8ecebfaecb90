"""What the wrong numbers of an insert resemble: a known mistake whose result, rounded, is what the kernel wrote."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from m3check.checks.turning import Stored, Turned
from m3check.checks.view import View

NORMED = ("q", "k", "idx_q", "idx_k")

ROWS = 4
"""Rows that a mistake must explain."""


def likeness(view: View, name: str, stored: Stored, rows: Tensor, wrong: Tensor) -> str:
    """The mistake that explains every wrong head in the first rows with one; empty where none does."""
    first = wrong.flatten(1).any(-1).nonzero().flatten()[:ROWS]
    stored, rows, heads = stored.cut(first), rows[first], wrong[first].any(-1)
    kind = {"q_codes": "q"}.get(name, name.removeprefix("cached_"))
    for words, value in _mistakes(view, kind, rows):
        bound = 4 * stored.turned.bound + 2.0**-18 * value.abs()  # of another formula, so an estimate
        tried = Stored(stored.actual, Turned(value, bound), stored.dtype, stored.model, stored.scale)
        fits = torch.stack([tried.shares(rule) <= 1.0 for rule in ("direct", "rounded")]).any(0)
        if bool(fits[heads].all()):
            return words
    return ""


def _mistakes(view: View, kind: str, rows: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(words, fp64 values [rows, heads, D]) of each."""
    more = view.problem.more
    other = {"k": "v", "v": "k"}.get(kind)
    for neighbour in (1, -1):
        x = more[f"x_{kind}"].to(rows.device)
        if x.shape[1] > 1:
            yield f"another {kind} head", _turned(view, kind, rows, x.roll(neighbour, 1))
    if kind == "v":
        yield "the key instead of the value", _turned(view, "k", rows)
        return
    if other:
        yield "the value instead of the key", more["x_v"].to(rows.device)[rows].double()
    x, weight = more[f"x_{kind}"].to(rows.device)[rows].double(), more[f"w_{kind}"].to(rows.device).double()
    eps = float(more["eps"])
    power = x.square().mean(-1, keepdim=True)
    right = x * (power + eps).rsqrt()
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    yield "as it was before the norm and the rotation", x
    yield "no rotation", right * (1 + weight)
    yield "no norm", _rotated(view, rows, x)
    yield "scaled by the norm weight instead of 1 + weight", _rotated(view, rows, right * weight)
    yield "no norm weight", _rotated(view, rows, right)
    yield "eps outside of the root", _rotated(view, rows, x / (power.sqrt() + eps) * (1 + weight))
    yield "no eps", _rotated(view, rows, x * power.rsqrt().nan_to_num(posinf=0.0) * (1 + weight))
    yield "the mean subtracted, as in a layer norm", _rotated(view, rows, centred * (variance + eps).rsqrt() * (1 + weight))
    for different in NORMED:
        if different != kind:
            yield (
                f"the norm weight of {different}",
                _rotated(view, rows, right * (1 + more[f"w_{different}"].to(rows.device).double())),
            )
    whole = right * (1 + weight)
    yield "pairs of neighbouring channels rotated (GPT-J) instead of halves (NeoX)", _rotated(view, rows, whole, "pairs")
    yield "rotated the other way", _rotated(view, rows, whole, "back")
    yield "all channels rotated", _rotated(view, rows, whole, "all")
    yield "the position after its own", _rotated(view, rows, whole, shift=1)
    yield "the position before its own", _rotated(view, rows, whole, shift=-1)
    model = more[f"x_{kind}"].dtype
    yield "rounded between the norm and the rotation", _rotated(view, rows, whole.to(model).double())


def _turned(view: View, kind: str, rows: Tensor, x: Tensor | None = None) -> Tensor:
    more = view.problem.more
    x = (more[f"x_{kind}"].to(rows.device) if x is None else x)[rows].double()
    if kind == "v":
        return x
    normed = x * (x.square().mean(-1, keepdim=True) + float(more["eps"])).rsqrt()
    return _rotated(view, rows, normed * (1 + more[f"w_{kind}"].to(rows.device).double()))


def _rotated(view: View, rows: Tensor, x: Tensor, how: str = "halves", shift: int = 0) -> Tensor:
    """Heads [rows, heads, D] rotated, rightly or in a wrong way."""
    more = view.problem.more
    position = (more["positions"].to(rows.device)[rows] + shift).clamp(min=0)
    angles = more["cos_sin"].to(rows.device)[position].double()[:, None]
    cos, sin = angles.chunk(2, dim=-1)
    sin = -sin if how == "back" else sin
    width = angles.shape[-1]
    out = x.clone()
    if how == "pairs":
        first, second = x[..., 0:width:2], x[..., 1:width:2]
        out[..., 0:width:2], out[..., 1:width:2] = first * cos - second * sin, second * cos + first * sin
        return out
    if how == "all":  # the angles again for the second half of each half
        cos, sin, width = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1), min(2 * width, x.shape[-1])
        cos, sin = cos[..., : width // 2], sin[..., : width // 2]
    first, second = x[..., : width // 2], x[..., width // 2 : width]
    out[..., :width] = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return out
