"""Two records of one target: what got worse, what got better. Reads records only, so it needs neither a GPU nor torch.

Results are matched by case, op and provider. Where the two records name different versions of one provider (and one each),
these are matched with each other: `compare` is how an upgrade is judged.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from m3check.report.tables import EVIDENCE_RANK, code, figure, in_op_order, ran, ratio, table
from m3check.report.tally import red_word, strict
from m3check.types import M3CheckError, Record, Result, Status

GROWTH = 2.0
"""Default factor: a lost bit. A kernel that uses twice as much of its bound as before computes with one bit less."""

REGRESSIONS = {
    "turned red": "red now, and not before",
    "red and new": "red now, and OLD has no such result",
    "missing": "ran before, and NEW has no such result",
    "skipped now": "ran before",
    "weaker evidence": "the kind of evidence says less than before",
    "weaker verdict": "passed before, and now could not have failed",
    "closer to its limit": "the worst measured/limit of the cases in both grew beyond the factor",
}
IMPROVEMENTS = {
    "turned green": "red before, and not now",
    "new": "OLD has no such result",
    "stronger evidence": "the kind of evidence says more than before",
}
UNCHANGED_RED = "still red"


@dataclass(frozen=True)
class Change:
    """One difference between two records."""

    kind: str
    op: str
    provider: str
    case: str
    detail: str = ""


@dataclass(frozen=True)
class Comparison:
    """Everything that differs, and how many results stand in both."""

    arch: str
    common: int
    changes: tuple[Change, ...]
    paired: tuple[tuple[str, str], ...] = ()
    """(old, new) provider names that were matched with each other."""

    @property
    def regressions(self) -> tuple[Change, ...]:
        """The changes that make `compare` exit 1."""
        return tuple(change for change in self.changes if change.kind in REGRESSIONS)


def compare(old: Record, new: Record, growth: float = GROWTH) -> Comparison:
    """What changed from `old` to `new`. Raises M3CheckError where the two cannot be compared."""
    if old.arch != new.arch:
        raise M3CheckError(
            f"the records are of different targets ({old.arch}, {new.arch}); "
            "compare takes two of one target, show makes the matrix of several"
        )
    if not any(ran(result) for result in old.results):
        raise M3CheckError("in the OLD record nothing ran, so nothing can have become worse; name another baseline")
    names = _pairs(old.results, new.results)
    before = _index(old.results, names)
    after = _index(new.results, {})
    changes: list[Change] = []
    for key, was in before.items():
        changes += _changed(key, was, after.get(key), strict(old), strict(new))
    for key, now in after.items():
        if key not in before and ran(now):
            word = red_word(now, strict(new))
            changes.append(_change("red and new" if word else "new", key, word or now.status.value))
    changes += _grown(before, after, growth)
    kinds, ops = [*REGRESSIONS, UNCHANGED_RED, *IMPROVEMENTS], in_op_order(c.op for c in changes)
    changes.sort(key=lambda c: (kinds.index(c.kind), ops.index(c.op), c.provider, c.case))
    return Comparison(old.arch, len(before.keys() & after.keys()), tuple(changes), tuple(names.items()))


def render(found: Comparison) -> str:
    """The comparison in Markdown, regressions first."""
    n = len(found.regressions)
    verdict = f"{n} regression{'s' if n != 1 else ''}" if n else "no regression"
    parts = [f"# m3check compare {found.arch}: {verdict}", f"{found.common} results stand in both records."]
    parts += [f"`{old}` was compared with `{new}`." for old, new in found.paired]
    for kind, words in {**REGRESSIONS, UNCHANGED_RED: "red before and now", **IMPROVEMENTS}.items():
        hits = [c for c in found.changes if c.kind == kind]
        if hits:
            rows = [(c.op, c.provider, c.detail, code(c.case)) for c in hits]
            grid = table(["op", "provider", "what", "case"], rows)
            parts.append(f"## {kind.capitalize()} ({len(hits)})\n\n{words[0].upper()}{words[1:]}.\n\n{grid}")
    return "\n\n".join(parts) + "\n"


def as_json(found: Comparison) -> str:
    """The comparison as JSON: arch, common, regressions (their number), paired, changes."""
    data = {**asdict(found), "regressions": len(found.regressions)}
    return json.dumps(data, indent=1) + "\n"


Key = tuple[str, str, str]
"""case, op, provider."""


def _pairs(old: Iterable[Result], new: Iterable[Result]) -> dict[str, str]:
    """Provider names of OLD that stand for another version in NEW."""
    left, right = _families(old), _families(new)
    return {
        next(iter(names)): next(iter(right[family]))
        for family, names in left.items()
        if len(names) == 1 and len(right.get(family, ())) == 1 and names != right[family]
    }


def _families(results: Iterable[Result]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for result in results:
        found.setdefault(result.provider.partition("==")[0], set()).add(result.provider)
    return found


def _index(results: Iterable[Result], names: Mapping[str, str]) -> dict[Key, Result]:
    """One result for each key: the one of the strongest evidence, where a case was judged by several."""
    found: dict[Key, Result] = {}
    for result in results:
        key = (result.case, result.op, names.get(result.provider, result.provider))
        if key not in found or _weight(result) > _weight(found[key]):
            found[key] = result
    return found


def _weight(result: Result) -> int:
    return EVIDENCE_RANK[result.evidence] + 1 if ran(result) else 0


def _change(kind: str, key: Key, detail: str) -> Change:
    case, op, provider = key
    return Change(kind, op, provider, case, detail)


def _changed(key: Key, was: Result, now: Result | None, stern_old: bool, stern_new: bool) -> list[Change]:
    if now is None or not ran(now):
        if not ran(was):
            return []
        return [_change("missing", key, was.status.value) if now is None else _change("skipped now", key, now.reason)]
    if not ran(was):
        word = red_word(now, stern_new)
        return [_change("red and new" if word else "new", key, word or f"{now.status.value}, was skipped")]
    changes = []
    red_before, red_now = red_word(was, stern_old), red_word(now, stern_new)
    if red_now:
        first = next((f.check for f in now.findings if f.status is Status.FAILED), now.reason)
        changes.append(_change(UNCHANGED_RED if red_before else "turned red", key, f"{red_now}: {first}"))
    elif red_before:
        changes.append(_change("turned green", key, f"{red_before} before, {now.status.value} now"))
    elif was.status is Status.PASSED and now.status in (Status.MISTRUSTED, Status.INCONCLUSIVE, Status.KNOWN):
        changes.append(_change("weaker verdict", key, f"{now.status.value}: {now.reason}"))
    if _weight(now) != _weight(was):
        kind = "weaker evidence" if _weight(now) < _weight(was) else "stronger evidence"
        changes.append(_change(kind, key, f"{was.evidence} before, {now.evidence} now"))
    return changes


def _grown(before: Mapping[Key, Result], after: Mapping[Key, Result], growth: float) -> list[Change]:
    """Per op, provider and check: the worst measured/limit over cases that both records judged by the same evidence."""
    both = [(before[k], after[k], k) for k in before.keys() & after.keys() if _weight(before[k]) == _weight(after[k])]
    old: dict[Key, tuple[float, str]] = {}
    new: dict[Key, tuple[float, str]] = {}
    for was, now, (case, op, provider) in sorted(both, key=lambda item: item[2]):
        for result, worst in ((was, old), (now, new)):
            for check, used in _used(result):
                group = (op, provider, check)
                if group not in worst or used > worst[group][0]:
                    worst[group] = (used, case)
    changes = []
    for (op, provider, check), (now_used, case) in new.items():
        was_used = old.get((op, provider, check), (0.0, ""))[0]
        if 0 < was_used * growth < now_used <= 1:  # beyond 1 the case is red and told as such
            detail = f"{check}: {figure(was_used)} before, {figure(now_used)} now"
            changes.append(Change("closer to its limit", op, provider, case, detail))
    return changes


def _used(result: Result) -> Sequence[tuple[str, float]]:
    return [(f.check, used) for f in result.findings if (used := ratio(f)) is not None]
