"""A failing case made small: one axis after the other, as long as it still fails for the same reason.

A greedy descent over the case's axes, in a fixed order. A case has few axes, each with an order of its own (fewer requests,
a shorter context, plainer dtypes), every try costs a kernel's run, and the smallest values are nearly always right or wrong
at once: jumps first, then halves, then single steps need some dozens of tries, and the same case gives the same result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from m3check import cases
from m3check.types import BLOCK, OPS, Case, Finding, Status, blocks

if TYPE_CHECKING:
    from m3check.runner import Session

SECONDS = 100.0
"""A descent ends after so long, wherever it is: interpreted cases take tenths of a second."""

STAGES = {  # checks that tell of one stage: a small case may fail another of them
    "score": ("finite_score", "edges", "score", "invisible_score", "forced_score"),
    "select": ("ids", "selection", "forced", "ties", "order"),
    "attend": ("finite", "dead_row", "membership", "needle", "two_keys", "element", "row", "token", "scale"),
    "memory": ("memory", "guards", "inputs", "padding"),
}


@dataclass(frozen=True)
class Shrunk:
    """The end of a descent."""

    case: Case
    reason: str
    tries: int
    finished: bool
    """False where its time was up before nothing could be left out any more."""


def reason_of(findings: list[Finding]) -> str:
    """Why a result is red, as far as a smaller case must share it: the stage, or the invariant; empty where it is not."""
    red = [finding.check for finding in findings if finding.status is Status.FAILED]
    if not red:
        return ""
    return next((stage for stage, checks in STAGES.items() if red[0] in checks), red[0])


def reason(case: Case, session: Session, wanted: str = "") -> str:
    """Why a case is red here, and empty where it is not; of the invariants only `wanted` is tried, or those it shows."""
    from m3check import invariants, rerun, runner

    if session.loaded.refuses(case) is not None:
        return ""
    kernel = session.loaded.kernel(case.op, case)
    assert kernel is not None
    inputs = runner.inputs_for(kernel, case, session.device)
    try:
        run, setting = runner.first_call(kernel, inputs, session)
        judge = runner.Judge(inputs, setting)
        findings = judge(inputs, run)
        found = reason_of(findings)
        if found or wanted in STAGES or wanted == "error":
            return found
        fitting = invariants.fitting(case, session.evidence)
        for name in fitting if not wanted else (wanted,):
            if name in fitting and reason_of(rerun.findings([name], kernel, session, inputs, run, setting, judge)):
                return name
    except runner.KernelRaised:
        return "error"
    return ""


def shrink(
    case: Case,
    attempt: Callable[[Case, str], str],
    told: Callable[[str], None] = lambda text: None,
    seconds: float = SECONDS,
) -> Shrunk:
    """The smallest case found that `attempt(case, reason)` gives the same reason for; ValueError where it is green."""
    wanted = attempt(case, "")
    if not wanted:
        raise ValueError(f"{cases.case_id(case)} does not fail")
    deadline, tries, seen = time.monotonic() + seconds, 1, {case}
    progress = True
    while progress:
        progress = False
        for step in STEPS:
            again = True
            while again:
                again = False
                for smaller in step(case):
                    if smaller in seen or cases.complaint(smaller) is not None:
                        continue
                    if time.monotonic() > deadline:
                        return Shrunk(case, wanted, tries, False)
                    seen.add(smaller)
                    tries += 1
                    if attempt(smaller, wanted) == wanted:
                        case, progress, again = smaller, True, True
                        told(f"{tries} tries: {cases.case_id(case)}")
                        break
    return Shrunk(case, wanted, tries, True)


# Steps: smaller cases along one axis, the smallest first. ---------------------------------------------------------------


def _requests(case: Case) -> Iterator[Case]:
    """One request alone, then all but one."""
    pairs = list(zip(case.query_lens, case.kv_lens, strict=True))
    keep = [[pair] for pair in dict.fromkeys(pairs)] + [pairs[:i] + pairs[i + 1 :] for i in range(len(pairs))]
    for few in keep:
        if 0 < len(few) < len(pairs):
            yield replace(case, query_lens=tuple(q for q, _ in few), kv_lens=tuple(kv for _, kv in few))


def _queries(case: Case) -> Iterator[Case]:
    """One query, two, half as many, one less; in all requests or in one."""
    longest = max(case.query_lens)
    for most in dict.fromkeys((1, 2, longest // 2, longest - 1)):
        if 0 < most < longest:
            yield replace(case, query_lens=tuple(min(q, most) for q in case.query_lens), max_query_len=0)
            yield replace(case, query_lens=tuple(min(q, most) for q in case.query_lens))
            # The first queries rather than the last: the prefix stays.
            ends = tuple(max(0, kv - max(0, q - most)) for q, kv in zip(case.query_lens, case.kv_lens, strict=True))
            yield replace(case, query_lens=tuple(min(q, most) for q in case.query_lens), kv_lens=ends)


def _contexts(case: Case) -> Iterator[Case]:
    """Fewer blocks with the same tail; of all requests, then of each."""
    most = blocks(case.context)
    counts = sorted({1, 2, 3, 4, case.topk + 1, case.topk + 2, most // 2, most - 1})

    def cut(kv: int, count: int) -> int:
        return kv if blocks(kv) <= count else (count - 1) * BLOCK + (kv - 1) % BLOCK + 1

    for count in counts:
        if 0 < count < most:
            yield replace(case, kv_lens=tuple(cut(kv, count) for kv in case.kv_lens))
    for i, kv in enumerate(case.kv_lens):
        for count in counts:
            if 0 < count < blocks(kv):
                yield _with_length(case, i, cut(kv, count))


def _tails(case: Case) -> Iterator[Case]:
    """Whole blocks, then one token in the last."""
    for i, kv in enumerate(case.kv_lens):
        whole = blocks(kv) * BLOCK
        for end in (whole, whole - BLOCK + 1):
            if kv not in (0, whole, whole - BLOCK + 1):
                yield _with_length(case, i, end)


def _with_length(case: Case, request: int, length: int) -> Case:
    lengths = list(case.kv_lens)
    lengths[request] = length
    return replace(case, kv_lens=tuple(lengths))


def _figure(name: str, *values: int) -> Callable[[Case], Iterator[Case]]:
    """Smaller values of one figure: those given, half of it, one less."""

    def step(case: Case) -> Iterator[Case]:
        now: int = getattr(case, name)
        for value in sorted({*values, now // 2, now - 1} if name != "head_dim" else set(values)):
            if min(values) <= value < now:
                fields: dict[str, Any] = {name: value}
                yield replace(case, **fields)

    return step


def _plainer(case: Case) -> Iterator[Case]:
    """Words at their defaults, one after the other: dtypes together where they depend on each other."""
    attends = OPS[case.op].chain or case.op.startswith("sparse_attn")
    together: list[dict[str, Any]] = [
        {"dtype": "bf16", "cache_dtype": "bf16", "index_cache_dtype": "bf16", "scales": "none"},
        {"cache_dtype": case.dtype, "scales": "none"} if attends else {"cache_dtype": case.dtype},
        {"scales": "none"},
        {"scales": "scalar"},
        {"layout": "hnd"},
        {"max_query_len": 0},
        {"fill": "gauss"},
        {"ids": "ascending"},
        {"ids": "full"},
        {"ids": "short"},
        {"seed": 0},
    ]
    for fields in together:
        if fields.get("scales") == "scalar" and case.scales != "token":
            continue
        if fields.get("ids") in ("short", "ascending") and case.ids not in ("holes", "future"):
            continue
        yield replace(case, **fields)


STEPS: tuple[Callable[[Case], Iterator[Case]], ...] = (
    _requests,
    _figure("topk", 1, 2, 3, 4),
    _contexts,
    _queries,
    _figure("kv_heads", 1, 2),
    _figure("gqa", 1, 2),
    _figure("head_dim", 64),
    _figure("init_blocks", 0, 1),
    _figure("local_blocks", 0, 1),
    _plainer,
    _tails,
)
"""What costs most is made small first."""
