"""The exit code of a run: pytest's numbers, and nothing that ran is never success."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from m3check.report.tally import SUFFICES, red_word, summarise
from m3check.types import Evidence, Exit, Result, Status

__all__ = ["MEANING", "belongs", "judge", "summarise"]

OK = 0
RED_RESULTS = 1
INTERRUPTED = 2
INTERNAL = 3
USAGE = 4
NOTHING_RAN = 5

MEANING = {
    OK: "every named provider gave results and none is red",
    RED_RESULTS: "failed, error, crashed or timeout (with --strict also noted, mistrusted, inconclusive), "
    "evidence weaker than --require, or a floor or ledger breach",
    INTERRUPTED: "interrupted",
    INTERNAL: "internal error",
    USAGE: "usage, or a named provider cannot be found",
    NOTHING_RAN: "nothing ran, or nothing for a named provider",
}


def judge(
    results: Iterable[Result],
    named: Sequence[str],
    *,
    strict: bool = False,
    require: Evidence | None = None,
    interrupted: bool = False,
    breaches: Sequence[str] = (),
    nothing: str = "no case was selected",
) -> Exit:
    """The exit of a run; `breaches` are the sentences of its gate, `nothing` says why a plan without a case has none.

    `named` are the providers as the user named them; results of others never change the code. With `require`, weaker
    evidence is a failure. Red weighs more than missing: a run that is both exits 1 and says both. Where nothing ran at all,
    that is the exit, whatever else was breached.
    """
    results = list(results)
    if interrupted:
        return Exit(INTERRUPTED, f"interrupted after {len(results)} results")
    counted = [r for r in results if any(belongs(r.provider, name) for name in named)]
    ran = [r for r in counted if r.status is not Status.SKIPPED]
    weak = [
        sentence for name in named for sentence in _weak([r for r in counted if belongs(r.provider, name)], name, require)
    ]
    breaches = [*weak, *breaches]
    red = Counter(word for r in counted for word in [red_word(r, strict)] if word)
    silent = [name for name in named if not any(belongs(r.provider, name) for r in ran)]
    missing = f"no result for {', '.join(silent)}" if silent and ran else ""
    if red:
        worst = ", ".join(f"{n} {word}" for word, n in sorted(red.items(), key=lambda item: (-item[1], item[0])))
        return Exit(RED_RESULTS, "; ".join(filter(None, [f"{worst} of {len(ran)} results", missing, _first(breaches)])))
    if not ran:
        return Exit(NOTHING_RAN, _why_nothing(counted, nothing))
    if breaches:
        return Exit(RED_RESULTS, "; ".join(filter(None, [_first(breaches), missing, f"{len(ran)} results, none red"])))
    if missing:
        return Exit(NOTHING_RAN, f"{missing}; {len(ran)} results of the others, none red")
    others = Counter(r.status.value for r in ran if r.status is not Status.PASSED)
    aside = "".join(f", {n} {word}" for word, n in sorted(others.items()))
    noted = sum(any(f.status is Status.NOTED for f in r.findings) for r in ran)
    aside += f", {noted} with notes" if noted else ""
    return Exit(OK, f"{len(ran)} results, none red{aside}")


def belongs(provider: str, name: str) -> bool:
    """Whether a result's provider is the one that was named; a name without a version stands for any version."""
    return provider == name or provider.startswith(f"{name}==")


def _first(breaches: Sequence[str]) -> str:
    """The first breach in full; the report has the others."""
    more = len(breaches) - 1
    return breaches[0] + (f" (and {more} more breaches)" if more > 0 else "") if breaches else ""


def _weak(results: Sequence[Result], name: str, require: Evidence | None) -> list[str]:
    """The sentence where results of a provider are weaker than what is required.

    A case whose result of that evidence was skipped with a sentence (a dtype that the target does not compile) is none, as
    long as others have such a result.
    """
    ran = [r for r in results if r.status is not Status.SKIPPED]
    if require is None or not ran:
        return []
    enough = {r.case for r in ran if r.evidence in SUFFICES[require]}
    excused = {r.case for r in results if r.status is Status.SKIPPED and r.evidence == require} if enough else set()
    weak = [r for r in ran if r.case not in enough | excused]
    if not weak:
        return []
    kinds = " and ".join(sorted({r.evidence for r in weak}))
    n = len({r.case for r in weak})
    return [
        f"--require {require}: {n} case{'s' if n != 1 else ''} of {name} {'have' if n != 1 else 'has'} {kinds} results only"
    ]


def _why_nothing(counted: Sequence[Result], nothing: str) -> str:
    if not counted:
        return f"nothing ran: {nothing}"
    reason, n = Counter(r.reason for r in counted).most_common(1)[0]
    return f"nothing ran: all {len(counted)} skipped" + (f", {n} because: {reason}" if reason else "")
