"""Inputs and reference results that are made once, before the processes that judge mutants are forked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from m3check import cases
from m3check.types import Case

KEPT = 1 << 30
"""Bytes of inputs and reference results that the parent keeps; cases beyond it are made again by each mutant."""

_kept: dict[tuple[Any, ...], Any] = {}


def keep(chosen: Sequence[Case]) -> None:
    """Make inputs and reference results of some cases now, for every process forked later; the functions are the same."""
    from m3check import checks, reference  # noqa: F401
    from m3check.cases import generate  # noqa: F401

    budget = KEPT - sum(_size(value) for value in _kept.values())
    make, dequantise, expect = cases.make_inputs, reference.dequantised, reference.expected
    if hasattr(make, "kept"):
        make, dequantise, expect = make.kept, dequantise.kept, expect.kept  # type: ignore[attr-defined]
    for case in chosen:
        if (case, "cpu") in _kept:
            continue
        if budget < 0:
            break
        inputs = make(case, "cpu")
        _kept[case, "cpu"] = inputs
        budget -= _size(inputs)
        for rule in ("rounded", "folded") if inputs.k_scale is not None else ("rounded",):
            problem = dequantise(inputs, rule)
            _kept[id(inputs), rule] = problem
            _kept[(id(problem),)] = expect(problem)
            budget -= _size(problem) + _size(_kept[(id(problem),)])
    cases.make_inputs = _from(lambda case, device="cpu": (case, str(device)), make)
    reference.dequantised = _from(lambda inputs, rule: (id(inputs), rule), dequantise)
    reference.expected = _from(lambda problem, *rest: (id(problem), *rest), expect)


def _from(key: Callable[..., tuple[Any, ...]], original: Any) -> Any:
    def remembered(*arguments: Any, **keywords: Any) -> Any:
        found = None if keywords else _kept.get(key(*arguments))
        return original(*arguments, **keywords) if found is None else found

    remembered.kept = original  # type: ignore[attr-defined]
    return remembered


def _size(value: Any) -> int:
    import torch

    tensors = value.values() if isinstance(value, dict) else vars(value).values()
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
