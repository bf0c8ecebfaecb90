"""The mutants that nothing killed and that were looked at: `reviewed.toml`, by content hash, each with a reason.

Beside them stand whole functions that no op can execute on the machines that measure (`[[elsewhere]]`): their edits that
no case reaches are told apart from those that the harness is blind for.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from m3check.mutants.mutant import Outcome

FILE = Path(__file__).with_name("reviewed.toml")
VERDICTS = ("equivalent", "accepted")

Place = tuple[str, str, str]
"""Provider, file, function."""


@dataclass(frozen=True)
class Reviewed:
    """One entry: `equivalent` computes the same on every call that the contract allows; `accepted` is a known gap."""

    key: str
    what: str
    verdict: str
    reason: str


def reviewed(file: Path = FILE) -> Mapping[str, Reviewed]:
    """The entries, by content hash, `keys` that share a reason taken apart.

    Raises ValueError for one that is there twice, has no reason or an unknown verdict.
    """
    entries: dict[str, Reviewed] = {}
    for raw in tomllib.loads(file.read_text(encoding="utf-8")).get("mutant", []):
        for key in raw.get("keys") or [raw["key"]]:
            entry = Reviewed(key, raw["what"], raw["verdict"], raw["reason"])
            if entry.verdict not in VERDICTS or not entry.reason.strip() or key in entries:
                raise ValueError(f"{file.name}: entry {key} is a duplicate, has no reason or an unknown verdict")
            entries[key] = entry
    return entries


def elsewhere(file: Path = FILE) -> Mapping[Place, str]:
    """The functions that only other machines execute, each with its reason; raises ValueError for one without."""
    places: dict[Place, str] = {}
    for raw in tomllib.loads(file.read_text(encoding="utf-8")).get("elsewhere", []):
        for function in raw["functions"]:
            if not raw["reason"].strip():
                raise ValueError(f"{file.name}: {function} has no reason")
            places[raw["provider"], raw["file"], function] = raw["reason"]
    return places


def judged(outcome: Outcome, entries: Mapping[str, Reviewed], places: Mapping[Place, str]) -> Outcome:
    """The outcome, with what was reviewed in place of `survived` and `unreached`."""
    mutant = outcome.mutant
    if outcome.verdict in ("survived", "unreached") and mutant.key in entries:
        return replace(outcome, verdict=entries[mutant.key].verdict, detail=entries[mutant.key].reason)
    place = mutant.provider, mutant.file, mutant.function
    if outcome.verdict == "unreached" and place in places:
        return replace(outcome, verdict="elsewhere", detail=places[place])
    return outcome
