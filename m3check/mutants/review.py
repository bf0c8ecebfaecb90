"""The mutants that nothing killed and that were looked at: `reviewed.toml`, by content hash, each with a reason."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from m3check.mutants.mutant import Outcome

FILE = Path(__file__).with_name("reviewed.toml")
VERDICTS = ("equivalent", "accepted")


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


def judged(outcomes: Sequence[Outcome], entries: Mapping[str, Reviewed]) -> list[Outcome]:
    """The outcomes, with what was reviewed in place of `survived` and `unreached`."""
    return [
        replace(o, verdict=entries[o.mutant.key].verdict, detail=entries[o.mutant.key].reason)
        if o.verdict in ("survived", "unreached") and o.mutant.key in entries
        else o
        for o in outcomes
    ]
