"""The search for one op of one provider: hypothesis draws cases, makes failing ones small and remembers them.

A search goes on in rounds. A failure that a round has found and made small is told, and later rounds pass over others of
its kind, so that one defect hides no other. An example runs once; hypothesis, which asks again, hears the answer of before.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from hypothesis import HealthCheck, Phase, Verbosity, assume, given, seed, settings
from hypothesis import strategies as st
from hypothesis.database import DirectoryBasedExampleDatabase
from hypothesis.errors import Unsatisfiable

from m3check import invariants
from m3check.cases.cost import cost
from m3check.cases.strategies import cases
from m3check.fuzz.kinds import kind, size
from m3check.types import Case, Evidence, Result, Status

TRIES = 150
"""Runs that one round may spend on each kind of failure that it finds; hypothesis needs some dozens to make it small."""

LOST = 20
"""How many of them one that ended its worker counts for: a fresh one takes seconds, a hang the whole time limit."""

HOPELESS = 20
"""Examples that a worker has refused, and none that ran, after which no more are tried."""


class Example(NamedTuple):
    """One try: a case, and the invariant that it is to show besides the comparisons, if any."""

    case: Case
    invariant: str


class _Hopeless(BaseException):
    """Ends a round in which a worker refused all; hypothesis takes an Exception for a failing example."""


class Red(Exception):
    """A red result, for hypothesis; each kind is a class of its own, since that is what it tells failures apart by."""


@cache
def _named(kind: str) -> type[Red]:
    return type(kind, (Red,), {})


@st.composite
def examples(draw: st.DrawFn, op: str, evidence: Evidence) -> Example:
    """Any case of an op, with any invariant that `m3check run --case` would show on it; no invariant is the plainest."""
    case = draw(cases(op, evidence))
    shown = invariants.affordable(case, evidence, cost(case, evidence))
    return Example(case, draw(st.sampled_from(("", *shown))))


class _Kept(DirectoryBasedExampleDatabase):
    """Failing examples on disk, one folder an op; none is forgotten because there was no time to try it again."""

    untried = False

    def delete(self, key: bytes, value: bytes) -> None:
        """Forget one that does not fail any more."""
        if not self.untried:
            super().delete(key, value)


class Search:
    """One op of one provider. `refuses` says what need not be tried; `folder` holds failing examples of earlier runs.

    The same `number` gives the same cases, if there is no folder and time suffices. `enough(shrinking)` is asked before
    each run but the first.
    """

    def __init__(
        self,
        op: str,
        evidence: Evidence,
        number: int,
        *,
        refuses: Callable[[Case], str | None] = lambda case: None,
        folder: Path | None = None,
        enough: Callable[[bool], bool] = lambda shrinking: False,
        strict: bool = False,
    ) -> None:
        self.op, self.evidence, self.number = op, evidence, number
        self._refuses, self._enough, self._strict = refuses, enough, strict
        self._database = _Kept(folder) if folder is not None else None
        self.seen: dict[Example, Result] = {}
        """Every example that ran, in order."""
        self.found: dict[str, Result] = {}
        """The smallest failing result of each kind."""
        self.ran = self.rounds = 0
        self._closed: set[str] = set()
        self._spent = 0

    def round(self, count: int, attempt: Callable[[Example], Result]) -> list[Result]:
        """Try up to `count` examples, make what fails small; the new kinds of failure, each on its smallest case.

        The first round begins with the failing examples of earlier runs.
        """
        replay = [Phase.reuse] if self._database is not None and not self.rounds else []
        if self._database is not None:
            self._database.untried = False
        self._spent = 0

        @settings(
            max_examples=count,
            database=self._database,
            phases=[*replay, Phase.generate, Phase.shrink],
            deadline=None,
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=True,
            print_blob=False,
            verbosity=Verbosity.quiet,
        )
        @seed(zlib.crc32(f"{self.op} {self.number} {self.rounds}".encode()))  # by itself it would switch the database off
        @given(examples(self.op, self.evidence))
        def examine(example: Example) -> None:
            self._examine(example, attempt)

        try:
            examine()
        except (Unsatisfiable, _Hopeless):
            pass  # nothing of this op is for this provider
        except Red:
            pass
        except ExceptionGroup as several:
            unexpected = several.split(Red)[1]
            if unexpected is not None:
                raise unexpected from None
        self.rounds += 1
        new = [name for name in self.found if name not in self._closed]
        self._closed |= set(new)
        return [self.found[name] for name in new]

    def results(self, most: int) -> list[Result]:
        """The failures, each on its smallest case, and up to `most` of the results that are not red."""
        others = [result for result in self.seen.values() if not kind(result, self._strict)]
        return [*self.found.values(), *[result for result in others if result.status is not Status.SKIPPED][:most]]

    def _examine(self, example: Example, attempt: Callable[[Example], Result]) -> None:
        result = self.seen.get(example)
        if result is None:
            assume(self._refuses(example.case) is None)
            if not self.ran and len(self.seen) >= HOPELESS:
                raise _Hopeless
            new = len(self.found) - len(self._closed)
            if self._spent > TRIES * new > 0 or (self.ran and self._enough(self._spent > 0)):
                if self._database is not None:
                    self._database.untried = True
                return
            result = self.seen[example] = attempt(example)
            self.ran += result.status is not Status.SKIPPED
            if self._spent or self._open(result):
                self._spent += LOST if result.status in (Status.CRASHED, Status.TIMEOUT) else 1
        assume(result.status is not Status.SKIPPED)
        name = self._open(result)
        if name:
            if name not in self.found or size(result) < size(self.found[name]):
                self.found[name] = result
            raise _named(name)(result.case)

    def _open(self, result: Result) -> str:
        """The kind of a failure that no earlier round has told; else empty."""
        name = kind(result, self._strict)
        return "" if name in self._closed else name
