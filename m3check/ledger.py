"""The ledger of known failures: which results a TOML file excuses, for how long, and when an entry itself is a mistake.

    [[known]]
    case = "index_decode/q=33,kv=8321,h=8,d=64,topk=48"   # and/or op = "…", select = "expression as behind -k"
    provider = "vllm==0.33.0"                             # optional: one or several; "vllm" stands for any version
    arch = "sm90"                                         # optional: one or several
    reason = "loses ids where 32 < topk < 64"
    issue = "https://…"
    expires = 2027-01-31                                  # the last day on which it excuses anything

An entry excuses `failed` results; other kinds (`crashed`, `timeout`, `error`, with --strict `noted` …) only where
`status` names them, and where `check` names checks, failures of these alone. An excused result is `known`, not red.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from m3check.expression import Matcher, matcher
from m3check.report.exits import belongs
from m3check.report.tally import red_word
from m3check.types import Breach, Case, Finding, Result, Status

SELECTORS = ("case", "op", "select")
FINDING = "ledger"
"""Name of the finding that a known result carries: what it would be without the ledger."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One known failure. Empty tuples mean any."""

    place: str  # "known.toml, entry 2"
    line: int  # of its [[known]] heading, from 1; 0 where there is none
    reason: str
    issue: str
    expires: datetime.date
    case: str = ""  # without a seed it stands for every seed
    op: str = ""
    select: str = ""
    arch: tuple[str, ...] = ()
    provider: tuple[str, ...] = ()
    evidence: tuple[str, ...] = ()
    status: tuple[str, ...] = (Status.FAILED.value,)
    check: tuple[str, ...] = ()

    @property
    def named(self) -> str:
        """Place and selector, as sentences begin with."""
        words = [f"{key} {getattr(self, key)!r}" for key in SELECTORS if getattr(self, key)]
        return f"{self.place} ({', '.join(words)})"

    @property
    def excuse(self) -> str:
        """The reason of a known result."""
        return f"{self.reason} ({self.issue}, until {self.expires})"

    @cached_property
    def _matches(self) -> Matcher:
        return matcher(self.select)

    def expired(self, today: datetime.date) -> bool:
        """Whether its last day is over."""
        return today > self.expires

    def concerns(self, arch: str, providers: Iterable[str]) -> bool:
        """Whether a run on this target with these providers (as named, or as results have them) is any of its business."""
        if self.arch and arch not in self.arch:
            return False
        wanted = self.provider
        return not wanted or any(belongs(p, name) or belongs(name, p) for p in providers for name in wanted)

    def selects(self, case: str, op: str, axes: Mapping[str, Any]) -> bool:
        """Whether a case is meant, whoever runs it: by its id, its op and its axes as `word=value`."""
        if self.op and op != self.op:
            return False
        if self.case and self.case not in (case, seedless(case)):
            return False
        return not self.select or self._matches(" ".join([case, *(f"{word}={value}" for word, value in axes.items())]))

    def of(self, provider: str) -> bool:
        """Whether it is for this provider, as results have it."""
        return not self.provider or any(belongs(provider, name) for name in self.provider)

    def means(self, result: Result) -> bool:
        """Whether it speaks of this result of its target, red or not."""
        return (
            self.of(result.provider)
            and (not self.evidence or result.evidence in self.evidence)
            and self.selects(result.case, result.op, result.axes)
        )

    def excuses(self, result: Result) -> bool:
        """Whether what is wrong with a result that it means is of a kind that it names."""
        failed = {f.check for f in result.findings if f.status in (Status.FAILED, Status.ERROR)}
        return red_word(result, strict=True) in self.status and (not self.check or failed <= set(self.check))


@dataclass(frozen=True)
class Ledger:
    """A ledger file as it was read."""

    file: str
    entries: tuple[Entry, ...]

    def cover(self, result: Result, arch: str, strict: bool, today: datetime.date) -> Result:
        """The result, `known` where it is red and an entry excuses it; where one almost does, the reason says why not."""
        if not red_word(result, strict):
            return result
        told = []
        for entry in self.entries:
            if not entry.concerns(arch, [result.provider]) or not entry.means(result):
                continue
            if entry.expired(today):
                told.append(f"{entry.place} excused this until {entry.expires}")
            elif entry.excuses(result):
                note = Finding(FINDING, Status.KNOWN, where=entry.place, hint=f"{result.status}: {result.reason}")
                return replace(result, status=Status.KNOWN, reason=entry.excuse, findings=(*result.findings, note))
            else:
                told.append(f"{entry.place} does not excuse this: it is for {_kinds(entry)}")
        told = [words for words in told if words not in result.reason]  # a merge covers again
        return replace(result, reason="; ".join([*filter(None, [result.reason]), *told])) if told else result

    def breaches(
        self,
        results: Sequence[Result],
        arch: str,
        providers: Sequence[str],
        planned: Iterable[Case],
        today: datetime.date,
        replay: bool = False,
    ) -> tuple[list[Breach], list[str]]:
        """What is wrong with the entries that concern a run, and sentences on what a part of a run cannot tell.

        `results` are those after `cover`; `planned` are the cases of the whole tier, of which a shard or a narrowed run has
        only some. In a replay of named cases only the entries that mean one of them are looked at.
        """
        found: list[Breach] = []
        waiting: list[str] = []
        whole = {seedless(name): case for name, case in _identified(planned)}
        for entry in self.entries:
            here = [r for r in results if entry.means(r)]
            if not entry.concerns(arch, [*providers, *(r.provider for r in results)]) or (replay and not here):
                continue
            if entry.expired(today):
                words = f"expired on {entry.expires}: mend the kernel, or look at {entry.issue} and set another date"
                found.append(Breach(f"{entry.named} {words}", self.file, entry.line))
                continue
            due = {name for name, case in whole.items() if entry.selects(name, case.op, case.axes())}
            missing = due - {seedless(r.case) for r in results if entry.of(r.provider)}
            wrong = _wrong(entry, here, bool(due))
            if wrong and missing:
                waiting.append(f"{entry.place} selects {len(missing)} cases that are not in this part of the run")
            elif wrong:
                found.append(Breach(f"{entry.named} {wrong}", self.file, entry.line))
        return found, waiting


def restored(result: Result) -> Result:
    """A known result as it was before a ledger covered it: a merge judges anew, by its own ledger."""
    note = next((f for f in result.findings if f.check == FINDING), None)
    if result.status is not Status.KNOWN or note is None:
        return result
    status, _, reason = note.hint.partition(": ")
    if status not in list(Status):
        return result  # not written by this m3check
    findings = tuple(f for f in result.findings if f.check != FINDING)
    return replace(result, status=Status(status), reason=reason, findings=findings)


def seedless(case: str) -> str:
    """A case id without its seed: another seed is another draw of the same case."""
    return re.sub(r"~\d+$", "", case)


def _wrong(entry: Entry, here: Sequence[Result], due: bool) -> str:
    """What is wrong with an entry that has not expired, given the results that it means."""
    ran = [r for r in here if r.status is not Status.SKIPPED]
    if not here:
        known = due or entry.case != seedless(entry.case)  # another seed is another run's business
        known = known or any(entry.selects(name, case.op, case.axes()) for name, case in _identified(_every_case()))
        return "" if known else "matches nothing: it selects no case of any tier; correct it or delete it"
    if not ran:
        return f"matches nothing that ran: all {len(here)} skipped, because {here[0].reason}"
    if any(_still(entry, result) for result in ran):
        return ""
    passed = f"its case passed on {ran[0].provider}" if len(ran) == 1 else f"all {len(ran)} results that it means passed"
    return f"passes unexpectedly: {passed}; delete the entry"


def _still(entry: Entry, result: Result) -> bool:
    before = restored(result)
    return bool(red_word(before, strict=False)) or red_word(before, strict=True) in entry.status


def _kinds(entry: Entry) -> str:
    return " and ".join(entry.status) + (f" by {', '.join(entry.check)}" if entry.check else "")


def _identified(cases: Iterable[Case]) -> list[tuple[str, Case]]:
    from m3check.cases import case_id

    return [(case_id(case), case) for case in cases]


def _every_case() -> tuple[Case, ...]:
    """The cases of all tiers: `full` holds smoke's and ci's."""
    from m3check.cases import tier

    return (*tier("full"), *tier("production"))
