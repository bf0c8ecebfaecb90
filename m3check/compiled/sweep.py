"""Recompile storms: over lengths and batch sizes that nothing distinguishes, a kernel is compiled once or a few times.

All sizes of a sweep lie between two powers of two, are odd and none is 1, so that neither divisibility by 16, nor the
special 1, nor a tile rounded up to a power of two tells them apart. What still compiles anew for each of them has a length
or a count among its constants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from m3check.compiled.capture import Launch, Specialisation
from m3check.types import OPS, Case, Finding, Status

ALLOWED = 4
"""Variants of one kernel in a sweep: two sizes that follow a length may each be divisible by 16 or not."""

CONTEXTS = tuple(range(2051, 4051, 182))
QUERIES = tuple(range(35, 57, 2))
BATCHES = tuple(range(35, 57, 2))


def sweeps(case: Case) -> Mapping[str, Sequence[Case]]:
    """Cases like this one that differ in one size only, by what differs."""
    decode = OPS[case.op].phase == "decode"
    plain = replace(case, fill="gauss", ids="full", max_query_len=0, seed=0)

    def of(queries: Iterable[int], lengths: Iterable[int]) -> Case:
        return replace(plain, query_lens=tuple(queries), kv_lens=tuple(lengths))

    found = {
        "context lengths": [of([1 if decode else 5], [n]) for n in CONTEXTS],
        "batch sizes": [of([1] * n, [131] * n) for n in BATCHES],
    }
    if not decode:
        found["query lengths"] = [of([n], [2051]) for n in QUERIES]
    return found


def storms(case: Case, capture: Callable[[Case], Sequence[Launch]]) -> list[Finding]:
    """Findings `recompiles`: for each sweep the kernel that compiles most often, and each that does so too often."""
    found: list[Finding] = []
    for what, cases in sweeps(case).items():
        variants: dict[str, dict[str, Specialisation]] = {}
        anew: dict[str, int] = {}
        for each in cases:
            new = set()
            for launch in capture(each):
                for candidate in launch.candidates:
                    key = candidate.source.hash() + candidate.options.hash()
                    if variants.setdefault(candidate.name, {}).setdefault(key, candidate) is candidate:
                        new.add(candidate.name)
            for name in new:
                anew[name] = anew.get(name, 0) + 1
        worst = max(anew.values(), default=0)
        for name, times in anew.items():
            if times > ALLOWED:
                cause = _culprits(variants[name].values())
                hint = f"{times} of {len(cases)} {what} compile it anew, allowed {ALLOWED}: {cause}"
                found.append(Finding("recompiles", Status.FAILED, float(times), float(ALLOWED), f"{name}, {what}", hint))
        if anew and worst <= ALLOWED:
            found.append(Finding("recompiles", Status.PASSED, float(worst), float(ALLOWED), what))
    return found


def _culprits(variants: Iterable[Specialisation]) -> str:
    """What differs between variants of one kernel, and how to mend it."""
    values: dict[str, set[str]] = {}
    for each in variants:
        names = list(each.source.signature)
        for path, value in each.source.constants.items():
            values.setdefault(names[path[0]], set()).add(str(value))
    several = {name: len(found) for name, found in values.items() if len(found) > 1}
    if not several:
        return "its launch options or alignments follow the size"
    name, count = max(several.items(), key=lambda item: item[1])
    return f"the constant {name} took {count} values; pass it as an ordinary argument, not as tl.constexpr"
