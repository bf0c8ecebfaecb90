"""Two records of one target: what got worse, what got better. Reads records only, so it needs neither a GPU nor torch.

Results are matched by case, op and provider. Where the two records name different versions of one provider (and one each),
these are matched with each other: `compare` is how an upgrade is judged.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from m3check.report.tables import EVIDENCE_RANK, code, computed, figure, in_op_order, ran, ratio, table
from m3check.report.tally import red_word, strict
from m3check.types import M3CheckError, Record, Result, Status

GROWTH = 2.0
"""Default factor: a lost bit. A kernel that uses twice as much of its bound as before computes with one bit less."""

REGRESSIONS = {
    "broke off": "NEW is no whole run",
    "turned red": "red now, and not before",
    "red and new": "red now, and OLD has no such result",
    "missing": "ran before, and NEW has no such result",
    "skipped now": "ran before",
    "weaker evidence": "the kind of evidence says less than before",
    "weaker verdict": "passed before, and now could not have failed, or fails as the ledger knows",
    "check gone": "judged these cases before, and none of them now",
    "closer to its limit": "the worst measured/limit of the cases in both grew beyond the factor",
}
IMPROVEMENTS = {
    "turned green": "red before, and not now",
    "new": "OLD has no such result",
    "stronger evidence": "the kind of evidence says more than before",
}
UNCHANGED = {
    "still red": "red before and now",
    "now known": "red before, and now a known failure of the ledger",
}


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
    if old.exit.code in (2, 3, 4):
        raise M3CheckError(
            f"the OLD record broke off (exit {old.exit.code}: {old.exit.reason}), so what it lacks cannot be told from "
            "what was never there; name another baseline"
        )
    if not any(ran(result) for result in old.results):
        raise M3CheckError("in the OLD record nothing ran, so nothing can have become worse; name another baseline")
    names = _pairs(old.results, new.results)
    before = _index(old.results, names)
    after = _index(new.results, {})
    changes: list[Change] = []
    if new.exit.code in (2, 3, 4):
        changes.append(Change("broke off", "", "", "", f"exit {new.exit.code}: {new.exit.reason}"))
    stern = strict(new) or strict(old)  # a run that no longer is strict must not look better for it
    for key, was in before.items():
        now = after.get(key)
        ran_it = after.get((*key[:3], True))
        if not computed(was) and now is None and ran_it is not None and ran_it.evidence == "device":
            continue  # what ran on the hardware was compiled for it
        changes += _changed(key, was, now, strict(old), stern)
    for key, now in after.items():
        if key not in before and ran(now):
            word = red_word(now, stern)
            changes.append(_change("red and new" if word else "new", key, word or now.status.value))
    changes += _grown(before, after, growth)
    changes += _gone(before, after)
    kinds, ops = [*REGRESSIONS, *UNCHANGED, *IMPROVEMENTS], in_op_order(c.op for c in changes)
    changes.sort(key=lambda c: (kinds.index(c.kind), ops.index(c.op), c.provider, c.case))
    return Comparison(old.arch, len(before.keys() & after.keys()), tuple(changes), tuple(names.items()))


def render(found: Comparison) -> str:
    """The comparison in Markdown, regressions first."""
    n = len(found.regressions)
    verdict = f"{n} regression{'s' if n != 1 else ''}" if n else "no regression"
    parts = [f"# m3check compare {found.arch}: {verdict}", f"{found.common} results stand in both records."]
    parts += [f"`{old}` was compared with `{new}`." for old, new in found.paired]
    for kind, words in {**REGRESSIONS, **UNCHANGED, **IMPROVEMENTS}.items():
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


Key = tuple[str, str, str, bool]
"""case, op, provider, and whether it was computed or only compiled."""
Group = tuple[str, str, str]
"""op, provider, check."""


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
        key = (result.case, result.op, names.get(result.provider, result.provider), computed(result))
        if key not in found or _weight(result) > _weight(found[key]):
            found[key] = result
    return found


def _weight(result: Result) -> int:
    return EVIDENCE_RANK[result.evidence] + 1 if ran(result) else 0


def _change(kind: str, key: Key, detail: str) -> Change:
    case, op, provider, ran_it = key
    return Change(kind, op, provider, case, detail if ran_it else f"compiled: {detail}")


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
        changes.append(_change("still red" if red_before else "turned red", key, f"{red_now}: {first}"))
    elif red_before and now.status is Status.KNOWN:
        changes.append(_change("now known", key, f"{red_before} before; {now.reason}"))
    elif red_before or (was.status is Status.KNOWN and now.status is not Status.KNOWN):
        changes.append(_change("turned green", key, f"{red_before or was.status} before, {now.status} now"))
    elif was.status is Status.PASSED and now.status in (Status.MISTRUSTED, Status.INCONCLUSIVE, Status.KNOWN):
        changes.append(_change("weaker verdict", key, f"{now.status.value}: {now.reason}"))
    if _weight(now) != _weight(was):
        kind = "weaker evidence" if _weight(now) < _weight(was) else "stronger evidence"
        changes.append(_change(kind, key, f"{was.evidence} before, {now.evidence} now"))
    return changes


def _grown(before: Mapping[Key, Result], after: Mapping[Key, Result], growth: float) -> list[Change]:
    """Per op, provider and check: the worst measured/limit over cases that both records judged by the same evidence."""
    both = [(before[k], after[k], k) for k in before.keys() & after.keys() if _weight(before[k]) == _weight(after[k])]
    old: dict[Group, tuple[float, str]] = {}
    new: dict[Group, tuple[float, str]] = {}
    for was, now, (case, op, provider, _) in sorted(both, key=lambda item: item[2]):
        for result, worst in ((was, old), (now, new)):
            for check, used in _used(result):
                group = (op, provider, check)
                if group not in worst or used > worst[group][0]:
                    worst[group] = (used, case)
    changes = []
    for (op, provider, check), (now_used, case) in new.items():
        if (op, provider, check) not in old or now_used > 1:  # beyond 1 the case is red and told as such
            continue
        was_used = old[op, provider, check][0]
        # Nothing grows by a factor from 0: told where one more such step would pass the limit.
        if now_used > was_used * growth if was_used else now_used * growth > 1:
            detail = f"{check}: {figure(was_used)} before, {figure(now_used)} now"
            changes.append(Change("closer to its limit", op, provider, case, detail))
    return changes


def _gone(before: Mapping[Key, Result], after: Mapping[Key, Result]) -> list[Change]:
    """Per op and provider: checks that passed on cases of both records and now judge none of them.

    Only cases that passed in both count: a red result shows no invariants, and every other change is told as such.
    """
    old: dict[Group, list[str]] = {}
    new: set[Group] = set()
    for key in sorted(before.keys() & after.keys()):
        was, now = before[key], after[key]
        if _weight(was) != _weight(now) or not was.status is now.status is Status.PASSED:
            continue
        case, op, provider, _ = key
        for finding in was.findings:
            if finding.status is Status.PASSED:
                old.setdefault((op, provider, finding.check), []).append(case)
        new |= {(op, provider, finding.check) for finding in now.findings}
    return [
        Change("check gone", op, provider, cases[0], f"{check}: {len(cases)} cases before, none now")
        for (op, provider, check), cases in old.items()
        if (op, provider, check) not in new
    ]


def _used(result: Result) -> Sequence[tuple[str, float]]:
    return [(f.check, used) for f in result.findings if (used := ratio(f)) is not None]
