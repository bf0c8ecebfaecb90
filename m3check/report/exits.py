"""The exit code of a run: pytest's numbers, and nothing that ran is never success."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from m3check.report.tally import red_word, summarise
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
    "or a floor or ledger breach",
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
) -> Exit:
    """The exit of a run; `breaches` are the sentences of its gate.

    `named` are the providers as the user named them; results of others never change the code. With `require` only results
    of that evidence count as having run. Red weighs more than missing: a run that is both exits 1 and says both. Where
    nothing ran at all, that is the exit, whatever else was breached.
    """
    results = list(results)
    if interrupted:
        return Exit(INTERRUPTED, f"interrupted after {len(results)} results")
    counted = [r for r in results if any(belongs(r.provider, name) for name in named)]
    ran = [r for r in counted if r.status is not Status.SKIPPED and (require is None or r.evidence == require)]
    red = Counter(word for r in counted for word in [red_word(r, strict)] if word)
    silent = [name for name in named if not any(belongs(r.provider, name) for r in ran)]
    kind = f"{require} " if require else ""
    missing = f"no {kind}result for {', '.join(silent)}" if silent and ran else ""
    if red:
        worst = ", ".join(f"{n} {word}" for word, n in sorted(red.items(), key=lambda item: (-item[1], item[0])))
        return Exit(RED_RESULTS, "; ".join(filter(None, [f"{worst} of {len(ran)} results", missing, _first(breaches)])))
    if not ran:
        return Exit(NOTHING_RAN, _why_nothing(counted, kind))
    if breaches:
        return Exit(RED_RESULTS, "; ".join(filter(None, [_first(breaches), missing, f"{len(ran)} results, none red"])))
    if missing:
        return Exit(NOTHING_RAN, f"{missing}; {len(ran)} results of the others, none red")
    weak = Counter(r.status.value for r in ran if r.status is not Status.PASSED)
    aside = "".join(f", {n} {word}" for word, n in sorted(weak.items()))
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


def _why_nothing(counted: Sequence[Result], kind: str) -> str:
    if not counted:
        return "nothing ran: no case was selected"
    skipped = [r for r in counted if r.status is Status.SKIPPED]
    if len(skipped) < len(counted):
        return f"nothing ran that counts: no {kind}result among {len(counted)}"
    reason, n = Counter(r.reason for r in skipped).most_common(1)[0]
    return f"nothing ran: all {len(skipped)} skipped" + (f", {n} because: {reason}" if reason else "")
