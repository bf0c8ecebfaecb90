"""Wrong inserts: norms, weights and eps, rotations, heads and positions of others, keys and values exchanged, scales.

A mistake is made in every kind of head at once. A diagnosis looks at the heads that are wrong alone, so one that was made
with keys only is named as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from m3check.hypotheses.geometry import Change
from m3check.hypotheses.hypothesis import Ground, Hypothesis
from m3check.types import Inputs, Outputs

if TYPE_CHECKING:
    from torch import Tensor

NORMED = ("q", "k", "idx_q", "idx_k")


def _more(inputs: Inputs, **changed: Tensor) -> Inputs:
    return replace(inputs, more={**inputs.more, **changed})


def _weights(change: Callable[[Tensor], Tensor]) -> Change:
    return lambda inputs: _more(inputs, **{f"w_{kind}": change(inputs.more[f"w_{kind}"].double()) for kind in NORMED})


def _weights_of(kind: str) -> Change:
    return lambda inputs: _more(inputs, **{f"w_{other}": inputs.more[f"w_{kind}"] for other in NORMED})


def _head_beside(by: int) -> Change:
    """Every head is worked out of its neighbour, values too."""

    def change(inputs: Inputs) -> Inputs | None:
        several = {f"x_{kind}": x.roll(by, 1) for kind in (*NORMED, "v") if (x := inputs.more[f"x_{kind}"]).shape[1] > 1}
        return _more(inputs, **several) if several else None

    return change


def _token_beside(by: int) -> Change:
    """Every token has the heads of its neighbour, turned by its own position."""

    def change(inputs: Inputs) -> Inputs | None:
        moved = {f"x_{kind}": inputs.more[f"x_{kind}"].roll(by, 0) for kind in (*NORMED, "v")}
        return _more(inputs, **moved) if inputs.case.total_queries > 1 else None

    return change


def _angles(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Change:
    """Cosines and sines of the batch, changed: a table of its rows alone, since positions go to a million."""

    def changed(inputs: Inputs) -> Inputs:
        import torch

        rows = inputs.more["cos_sin"][inputs.more["positions"]]
        table = torch.cat(change(*rows.chunk(2, -1)), -1)
        return _more(inputs, cos_sin=table, positions=torch.arange(len(rows), device=rows.device))

    return changed


def _everywhere(inputs: Inputs) -> Inputs | None:
    """Twice as many channels of a head: the angles a second time. None where all are rotated."""
    if 2 * inputs.more["cos_sin"].shape[1] > inputs.case.head_dim:
        return None
    return _angles(lambda cos, sin: (cos.repeat(1, 2), sin.repeat(1, 2)))(inputs)


def _position(by: int) -> Change:
    return lambda inputs: _more(inputs, positions=(inputs.more["positions"] + by).clamp(min=0))


def _eps(value: float) -> Change:
    """Another eps; None where it is the case's own."""

    def changed(inputs: Inputs) -> Inputs | None:
        own = inputs.more["eps"]
        return None if float(own) == value else _more(inputs, eps=own * 0 + value)

    return changed


def _scale(change: Callable[[float], float]) -> Change:
    """Another scale of queries in fp8."""

    def changed(inputs: Inputs) -> Inputs | None:
        scale = float(inputs.more["q_scale"])
        other = change(scale)
        return None if scale == 1.0 else _more(inputs, q_scale=inputs.more["q_scale"] * 0 + other)

    return changed


# Other formulas ------------------------------------------------------------------------------------------------------


def _heads(inputs: Inputs, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """(fresh heads [T, heads, D], their mean square, 1 + weight), fp64."""
    x = inputs.more[f"x_{kind}"].double()
    return x, x.square().mean(-1, keepdim=True), 1 + inputs.more[f"w_{kind}"].double()


def rotated(inputs: Inputs, x: Tensor) -> Tensor:
    """Heads [T, heads, D] rotated by their positions."""
    import torch

    cos, sin = inputs.more["cos_sin"][inputs.more["positions"]].double()[:, None].chunk(2, -1)
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


def _normed(of: Callable[[Tensor, Tensor, Tensor, float], Tensor], turned: bool = True) -> Callable[[Ground], Outputs]:
    """Heads as `of` norms them: from heads, mean squares, 1 + weight and eps."""

    def result(ground: Ground) -> Outputs:
        made = {kind: of(*_heads(ground.inputs, kind), float(ground.inputs.more["eps"])) for kind in NORMED}
        return {kind: rotated(ground.inputs, x) if turned else x for kind, x in made.items()}

    return result


def _layer_norm(x: Tensor, power: Tensor, weight: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def _one_norm(ground: Ground) -> Outputs:
    """One mean square for all heads of a kind."""

    def worked(kind: str) -> Tensor:
        x, power, weight = _heads(ground.inputs, kind)
        return rotated(ground.inputs, x * (power.mean(1, keepdim=True) + float(ground.inputs.more["eps"])).rsqrt() * weight)

    return {kind: worked(kind) for kind in NORMED if ground.right[kind].shape[1] > 1}


def _rounded_between(ground: Ground) -> Outputs:
    """The norm's result is stored in the dtype of the keys before it is rotated."""
    model, eps = ground.inputs.more["x_q"].dtype, float(ground.inputs.more["eps"])

    def worked(kind: str) -> Tensor:
        x, power, weight = _heads(ground.inputs, kind)
        return rotated(ground.inputs, (x * (power + eps).rsqrt() * weight).to(model).double())

    return {kind: worked(kind) for kind in NORMED}


def _pairs(ground: Ground) -> Outputs:
    """Channels 2 i and 2 i + 1 turned into each other: the right rotation of channels in another order, put back."""
    import torch

    width = ground.inputs.more["cos_sin"].shape[1]
    rest = torch.arange(width, ground.inputs.case.head_dim)
    order = torch.cat([torch.arange(0, width, 2), torch.arange(1, width, 2), rest])
    back = order.argsort()
    names = [f"{what}_{kind}" for what in "xw" for kind in NORMED]
    found = ground.answer(_more(ground.inputs, **{name: ground.inputs.more[name][..., order] for name in names}))
    return {kind: found[kind][..., back] for kind in NORMED}


def _unwritten(ground: Ground) -> Outputs:
    """What poisoned memory holds."""
    return {kind: ground.right[kind] * float("nan") for kind in (*NORMED, "v")}


def _exchanged(ground: Ground) -> Outputs:
    return {"k": ground.right["v"], "v": ground.right["k"]}


def given(problem: Inputs, outputs: Outputs, emits: str) -> dict[str, Tensor]:
    """What a kernel without any error but the last rounding stores of `outputs`, in the buffers that its case has."""
    from m3check import paging
    from m3check.checks.turning import kept, nearest
    from m3check.kernels.calls.slots import written

    case, dtypes, found = problem.case, paging.stored(problem.case), {}
    for name in written(case):
        x, dtype = outputs[{"q_codes": "q"}.get(name, name.removeprefix("cached_"))], dtypes[name]
        if dtype.itemsize == 1 and emits == "rounded":
            x = nearest(x, problem.more["x_q"].dtype)
        if name == "q_codes":
            x = x / float(problem.more["q_scale"])
        x = x * kept(problem.more, name).to(x.device)[:, None, None]
        stored = nearest(x, dtype) + 0.0  # no zero has a sign: what differs in that alone is no other answer
        found[name] = stored.float() if dtype.itemsize == 1 else stored.to(dtype)
    return found


def _made(name: str, words: str, change: Change, gross: bool = False) -> Hypothesis:
    return Hypothesis(f"insert_{name}", "insert", words, change, gross)


def _other(name: str, words: str, result: Callable[[Ground], Outputs], gross: bool = False) -> Hypothesis:
    return Hypothesis(f"insert_{name}", "insert", words, None, gross, result=result)


HYPOTHESES: tuple[Hypothesis, ...] = (
    _other("norm_lost", "no norm", _normed(lambda x, power, weight, eps: x), gross=True),
    _other("untouched", "as it was before the norm and the rotation",
           _normed(lambda x, power, weight, eps: x, turned=False)),
    _made("rotation_lost", "no rotation", _angles(lambda cos, sin: (cos * 0 + 1, sin * 0)), gross=True),
    _made("weight_alone", "scaled by the norm weight instead of 1 + weight", _weights(lambda w: w - 1)),
    _made("weight_lost", "no norm weight", _weights(lambda w: w * 0)),
    *(_made(f"weight_of_{kind}", f"the norm weight of {kind}", _weights_of(kind)) for kind in NORMED),
    _other("eps_outside", "eps outside of the root",
           _normed(lambda x, power, weight, eps: x / (power.sqrt() + eps) * weight)),
    _made("eps_lost", "no eps", _eps(0.0)),
    *(_made(f"eps_{value:.0e}", f"an eps of {value:.0e}", _eps(value)) for value in (1e-5, 1e-6)),
    _other("norm_sum", "the sum of squares instead of their mean",
           _normed(lambda x, power, weight, eps: x / (power * x.shape[-1] + eps).sqrt() * weight)),
    _other("norm_centred", "the mean subtracted, as in a layer norm", _normed(_layer_norm)),
    _other("norm_shared", "one norm over all heads of a kind", _one_norm),
    _other("pairs", "pairs of neighbouring channels rotated (GPT-J) instead of halves (NeoX)", _pairs),
    _made("rotation_back", "rotated the other way", _angles(lambda cos, sin: (cos, -sin))),
    _made("rotation_swapped", "cosines and sines exchanged", _angles(lambda cos, sin: (sin, cos))),
    _made("rotation_whole", "all channels rotated", _everywhere),
    _made("position_after", "the position after its own", _position(1)),
    _made("position_before", "the position before its own", _position(-1)),
    _other("rounded_between", "rounded between the norm and the rotation", _rounded_between),
    _made("head_before", "the head before in place of each", _head_beside(1), gross=True),
    _made("head_after", "the head after in place of each", _head_beside(-1)),
    _made("token_before", "the token before in place of each, at the right position", _token_beside(1)),
    _other("values_for_keys", "the value instead of the key", lambda ground: {"k": ground.right["v"]}),
    _other("keys_for_values", "the key instead of the value", lambda ground: {"v": ground.right["k"]}),
    _other("exchanged", "the key instead of the value, and the value instead of the key", _exchanged),
    _other("unwritten", "nothing is written there", _unwritten),
    _made("q_scale_lost", "queries in fp8 without their scale", _scale(lambda scale: 1.0)),
    _made("q_scale_inverse", "queries in fp8 multiplied by their scale", _scale(lambda scale: 1 / scale)),
)  # fmt: skip
