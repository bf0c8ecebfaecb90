"""What every provider of kernels says of itself: how it is named, what it loaded, what it cannot run and why."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

from m3check.arch import Arch
from m3check.kernels import named
from m3check.kernels.project import Project
from m3check.types import OPS, Case, Evidence, Kernel


@dataclass(frozen=True)
class Spec:
    """A provider as named on the command line."""

    text: str
    """As typed; results, reports and repro lines carry it."""
    provider: str
    """The name of an entry of PROVIDERS."""
    version: str = ""
    path: str = ""
    """Absolute path of a file or folder."""
    module: str = ""
    """Dotted name of a user's module."""


@dataclass(frozen=True)
class Provider:
    """One entry of PROVIDERS."""

    name: str
    grammar: tuple[str, ...]
    """The forms of SPEC that name it."""
    summary: str
    needs: str
    """What must be installed or reachable, in words."""
    module: str
    """Where its `prepare`, `load` and `refuses` are; imported only when they are called."""
    distribution: str = ""
    """What is installed where it is: a name on the package index, whose version is told."""
    project: Project | None = None
    """Whose published wheels hold its kernels; such a provider may be named by a version, `name==X.Y.Z`."""

    @property
    def paths(self) -> bool:
        """Whether it may be named by a path, `name:PATH`."""
        return f"{self.name}:PATH" in self.grammar


Refusal = Callable[[str, Case], str | None]
"""Of an op (never a chain) and a case: the sentence why the kernel cannot run it, or None."""


def _accepts(op: str, case: Case) -> str | None:
    return None


@dataclass(frozen=True)
class Loaded:
    """A provider's kernels in this process."""

    spec: Spec
    kernels: Mapping[str, Kernel]
    missing: Mapping[str, str] = field(default_factory=dict)
    """A sentence for each op that the provider does not have."""
    description: Mapping[str, str] = field(default_factory=dict)
    """Facts for the record: version, where from, hashes."""
    warnings: tuple[str, ...] = ()
    refusal: Refusal = _accepts
    dependent_launch: Callable[[bool], None] | None = None
    """Switches programmatic dependent launch on and off, where the kernels use it."""
    tiles: Sequence[tuple[str, Callable[[], AbstractContextManager[None]]]] = ()
    """Named tile sizes and split counts that must not change a result, and what sets each for a while."""
    on_compile: Callable[[Callable[[bool], None]], None] | None = None
    """Takes what is told before and after each call that may compile otherwise than by Triton, whose own hooks tell."""
    produced: Callable[[Case], Mapping[str, Kernel]] | None = None
    """All kernels, by op, that production runs for a case, where that depends on more than the target; else `kernels`."""

    def kernel(self, op: str, case: Case) -> Kernel | None:
        """The kernel of an op for a case."""
        return (self.kernels if self.produced is None else self.produced(case)).get(op)

    @classmethod
    def of(cls, kernels: Mapping[str, Kernel]) -> Loaded:
        """Kernels that came from no provider, such as a function given to `m3check.verify`."""
        return cls(Spec("user", "user"), kernels)

    def refuses(self, case: Case) -> str | None:
        """Why this provider's kernel for the case's op cannot run the case, or None where it can."""
        served = self.kernel(case.op, case)
        if served is None:
            return self.missing.get(case.op, f"{self.spec.text} has no {case.op}")
        for op in OPS[case.op].chain or (case.op,):
            kernel = served.parts.get(op, served)
            sentence = _no_scales(kernel, case) or named.refusal(kernel, case) or self.refusal(op, case)
            if sentence:
                return sentence
        return None


def with_chains(kernels: Mapping[str, Kernel], missing: Mapping[str, str]) -> tuple[dict[str, Kernel], dict[str, str]]:
    """The kernels and the chains made of them, and a sentence for each chain that lacks a part."""
    all_kernels, all_missing = dict(kernels), dict(missing)
    for op in OPS.values():
        if not op.chain:
            continue
        lacking = [part for part in op.chain if part not in kernels]
        if lacking:
            reasons = " ".join(all_missing.get(part, "") for part in lacking).strip()
            all_missing[op.name] = f"the chain {op.name} needs {', '.join(lacking)}: {reasons}"
            continue
        parts = {part: kernels[part] for part in op.chain}
        select, attend = parts[next(part for part in op.chain if "ids" in OPS[part].outputs)], parts[op.chain[-1]]
        profile = replace(
            attend.profile,
            id_order=select.profile.id_order,
            tie_rule=select.profile.tie_rule,
            forcing=select.profile.forcing,
            odd_scores=select.profile.odd_scores,
            dead_ids=select.profile.dead_ids,
        )
        name = " + ".join(part.name for part in parts.values())
        function: Callable[..., Any] = _by_parts
        if op.phase == "mixed":
            from m3check.kernels.composed import ComposedMaker

            function = ComposedMaker(parts)
        all_kernels[op.name] = Kernel(attend.provider, op.name, name, profile, function, parts)
    return all_kernels, all_missing


def index_dtypes(case: Case) -> tuple[str, str]:
    """Dtypes of the index queries and of the index keys; a chain's queries follow an fp8 index cache."""
    if not OPS[case.op].chain:
        return case.dtype, case.cache_dtype
    keys = case.index_cache_dtype
    return keys if keys.startswith("fp8") else case.dtype, keys


def cannot_compile(case: Case, arch: Arch, evidence: Evidence) -> str | None:
    """Why Triton has no fp8 dtype of the case on a device; the interpreter has them all, and a compiler says it itself."""
    if evidence != "device":
        return None
    for dtype in (case.dtype, case.cache_dtype, *([case.index_cache_dtype] if OPS[case.op].chain else [])):
        if dtype.startswith("fp8") and dtype not in arch.fp8:
            return f"Triton compiles no {dtype} for {arch.name}, only {', '.join(sorted(arch.fp8))}"
    return None


def _no_scales(kernel: Kernel, case: Case) -> str | None:
    if case.scales == "none" or not kernel.op.startswith("sparse_attn"):
        return None
    try:
        parameters = inspect.signature(kernel.function).parameters
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) or {"k_scale", "v_scale"} <= set(parameters):
        return None
    return f"{kernel.name} takes no k_scale and v_scale, so it cannot read a scaled cache"


def _by_parts(**_: object) -> None:
    raise TypeError("a chain has no function of its own: contract.call runs its parts")
