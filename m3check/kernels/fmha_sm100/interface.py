"""The functions of fmha_sm100, and of vLLM beside it, that the adapters call; importing them compiles nothing yet."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from m3check.kernels.fmha_sm100.locate import VENDORED, Found
from m3check.kernels.library import Clock

Function = Callable[..., Any]

_HERE: Mapping[str, tuple[str, str]] = {  # field: (module of the package, function)
    "plan": ("api", "_fmha_sm100_plan"),
    "run": ("api", "_fmha_sm100"),
    "select": ("api", "sparse_topk_select"),
    "build_csr": ("sparse", "build_k2q_csr"),
    "attend": ("sparse", "sparse_atten_func"),
}

HEAD_MAJOR = (
    "this sparse_topk_select has no max_score_layout, so it is MiniMax's own MSA, whose scores are [heads, tiles, tokens] "
    "with one bound for all rows; wanted the form that vLLM calls: an installed vLLM, or a checkout of vllm-project/MSA"
)
"""Its OnlyScore checks no shape: a buffer of tokens, heads, tiles would be written in the other order, silently."""

_VLLM = "vllm.models.minimax_m3.nvidia"

_BESIDE: Mapping[str, tuple[str, str]] = {  # field: (module of vLLM, function)
    "decode_score": (f"{_VLLM}.ops.index_decode_score", "minimax_m3_index_decode_score_cutedsl"),
    "prepare_decode": (f"{_VLLM}.msa_cutlass_sparse_decode", "prepare_decode_metadata"),
    "attend_decode": (f"{_VLLM}.msa_cutlass_sparse_decode", "msa_cutlass_sparse_decode"),
    "plan_cache": (f"{_VLLM}.msa_cutlass_sparse_decode", "MSACutlassDecodePlanCache"),
}


@dataclass(frozen=True)
class Interface:
    """What there is of it; a function that is not there is None and has a sentence in `absent`."""

    plan: Function | None = None
    run: Function | None = None
    select: Function | None = None
    build_csr: Function | None = None
    attend: Function | None = None
    decode_score: Function | None = None
    prepare_decode: Function | None = None
    attend_decode: Function | None = None
    plan_cache: Function | None = None
    absent: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, module: object) -> Interface:
        """From anything that has the functions by their own names, such as a model of them."""
        names = {name: function for name, (_, function) in {**_HERE, **_BESIDE}.items()}
        held = {name: getattr(module, function, None) for name, function in names.items()}
        return cls(**held, absent={name: f"there is no {names[name]}" for name, f in held.items() if f is None})

    def timed(self, clock: Clock) -> Interface:
        """The same functions; a clock stops while one of them, which may compile, is called."""
        held = {name: getattr(self, name) for name in {**_HERE, **_BESIDE} if name != "plan_cache"}
        told: dict[str, Any] = {name: clock.stopped(function) for name, function in held.items() if function is not None}
        return replace(self, **told)

    def lacking(self, *names: str) -> str | None:
        """Why one of some functions is not there; None where all are."""
        return next((self.absent.get(name, f"there is no {name}") for name in names if getattr(self, name) is None), None)


def takes(function: Function, name: str) -> bool:
    """Whether a function has a parameter of that name; one that does not tell is taken to be as in vLLM."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return True
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def imported(found: Found) -> Interface:
    """Import what a package has; what does not import is absent, and its sentence says why."""
    if found.path and found.path not in sys.path:
        sys.path.insert(0, found.path)
    sources = {name: (f"{found.package}.{module}", function) for name, (module, function) in _HERE.items()}
    absent: dict[str, str] = {}
    if found.package == VENDORED:
        sources |= _BESIDE
    else:
        absent = {name: f"{function} is vLLM's ({module}), and not in MSA" for name, (module, function) in _BESIDE.items()}
    held: dict[str, Function] = {}
    for name, (module, function) in sources.items():
        try:
            held[name] = getattr(importlib.import_module(module), function)
        except (Exception, SystemExit) as error:
            absent[name] = f"{module}.{function} does not import: {type(error).__name__}: {' '.join(str(error).split())}"
    if "select" in held and not takes(held["select"], "max_score_layout"):
        for name in ("plan", "run", "select"):
            held.pop(name, None)
            absent[name] = HEAD_MAJOR
    assert held.keys() <= {each.name for each in fields(Interface)}
    return Interface(**held, absent=absent)
