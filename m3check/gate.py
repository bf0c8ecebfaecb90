"""The gate of a run: its results with known failures marked, and what makes it red although no result is.

A shard sees neither whether a floor is met nor whether an entry of the ledger still matches: `m3check merge` judges that,
by its own settings or by those of the shards. A replay of named cases (`--case`) is held to no floor.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from m3check import floors, ledger, ledgerfile
from m3check.types import Breach, Case, Result

if TYPE_CHECKING:
    from m3check.config import RunOptions


@dataclass(frozen=True)
class Judgement:
    """Results after the ledger, and what the gate has to say of them."""

    results: tuple[Result, ...]
    breaches: tuple[Breach, ...] = ()
    waiting: tuple[str, ...] = ()
    """What could not be judged here, and where it is."""
    facts: dict[str, Any] | None = None
    """For the record's environment; None where no gate was asked for."""


class Gate:
    """Ledger and floors of one run. Raises M3CheckError for a ledger that cannot be used, before anything has run."""

    def __init__(self, options: RunOptions, today: datetime.date | None = None) -> None:
        self.options = options
        self.ledger = ledgerfile.read(options.ledger) if options.ledger is not None else None
        self.today = today or datetime.datetime.now(datetime.UTC).date()

    def cover(self, result: Result) -> Result:
        """One result as the ledger has it."""
        if self.ledger is None:
            return result
        return self.ledger.cover(result, self.options.arch, self.options.strict, self.today)

    def judge(
        self,
        results: Iterable[Result],
        planned: Iterable[Case] | None = None,
        *,
        whole: bool = False,
        broken: bool = False,
    ) -> Judgement:
        """All results of a run. `planned` are the cases of its tiers; `whole` says that these are no shard, as in a merge;
        `broken` that it was interrupted: then nothing is judged that needs all of it.
        """
        options = self.options
        covered = tuple(self.cover(result) for result in results)
        if broken or (self.ledger is None and not floors.limits(options.floors)):
            return Judgement(covered)
        part = options.shard != (1, 1) and not whole
        found: list[Breach] = []
        waiting: list[str] = []
        if self.ledger is not None:
            due = planned if planned is not None else tier_cases([options])
            replay = bool(options.cases) and not whole
            found, waiting = self.ledger.breaches(covered, options.arch, options.kernels, due, self.today, replay)
        if floors.limits(options.floors):
            if part:
                waiting.append("floors are judged when the shards are merged")
            elif options.cases and not whole:
                waiting.append("no floor is asked of named cases")
            else:
                found += floors.breaches(options.floors, covered, options.kernels)
        facts = {
            "ledger": str(options.ledger or ""),
            "known": sum(ledger.restored(r) is not r for r in covered),
            "floors": list(options.floors),
            "breaches": [asdict(breach) for breach in found],
            "waiting": waiting,
        }
        return Judgement(covered, tuple(found), tuple(waiting), facts)


def tier_cases(asked: Sequence[RunOptions]) -> list[Case]:
    """The cases of the whole tiers of some runs: what their ledgers may select, however the runs were narrowed."""
    from m3check import cases

    names = dict.fromkeys(name for each in asked for name in (("full", "production") if each.cases else (each.tier,)))
    named = [cases.parse_id(text) for each in asked for text in each.cases]
    return list(dict.fromkeys([*(case for name in names for case in cases.tier(name)), *named]))
