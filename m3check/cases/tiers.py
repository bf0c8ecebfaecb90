"""Named sets of cases: `smoke` within `ci` within `full`, and `production`, the shapes of real calls.

The lists are data (one id a line), so that a change shows in a diff and an upgrade of anything changes none of them.
`smoke`, `real`, `named` and the probes are written by hand; `ci` and `full` add what `python -m m3check.cases.covering`
wrote: every pair of axis values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from m3check.cases import families
from m3check.cases.ident import case_id, meant, parse_id
from m3check.types import OPS, Case, M3CheckError

DATA = Path(__file__).parent.parent / "data"

LISTS: Mapping[str, tuple[str, ...]] = {  # a tier and the lists that make it up, in the order of a plan
    "smoke": ("smoke",),
    "ci": ("smoke", "real", "probes", "named", "ci"),
    "full": ("smoke", "real", "probes", "named", "ci", "probes_full", "full", "long"),
}

TIERS: Mapping[str, str] = {
    "smoke": "every op, dtype and mode once; a minute or two on two CPU cores",
    "ci": "every pair of the values that an interpreter affords; some minutes on two CPU cores",
    "full": "every pair of all axis values and contexts to 1M tokens; minutes on a device",
    "production": "the shapes of real prefill calls; needs a device",
}


def tier(name: str, ops: Sequence[str] | None = None) -> tuple[Case, ...]:
    """The cases of a tier, of all ops or of some, in plan order; raises M3CheckError for an unknown name."""
    if name not in TIERS:
        raise M3CheckError(f"unknown tier {name!r}; known tiers: {', '.join(TIERS)}")
    for op in ops or ():
        if op not in OPS:
            raise M3CheckError(f"unknown op {op!r}{meant(op, OPS)}; known ops: {', '.join(OPS)}")
    cases = _tier(name)
    return tuple(case for case in cases if case.op in ops) if ops else cases


@lru_cache
def _tier(name: str) -> tuple[Case, ...]:
    if name == "production":
        from m3check.cases.production import production

        return (*production(), *_of_families(["production"]))
    cases = [*listed_cases(*LISTS[name]), *_of_families(tuple(LISTS)[: tuple(LISTS).index(name) + 1])]
    return tuple(sorted(dict.fromkeys(cases), key=lambda case: tuple(OPS).index(case.op)))


def _of_families(tiers: Iterable[str]) -> list[Case]:
    """What other families than block-sparse attention add to some tiers."""
    return [parse_id(line) for tier in tiers for line in families.listed(tier)]


def listed(name: str) -> tuple[str, ...]:
    """The ids of one list in m3check/data, comments left out."""
    text = (DATA / f"{name}.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line and not line.startswith("#"))


def listed_cases(*names: str) -> list[Case]:
    """The cases of some lists."""
    return [parse_id(line) for name in names for line in listed(name)]


def shard(cases: Iterable[Case], index: int, count: int) -> list[Case]:
    """Part `index` (from 1) of `count`: by a hash of the id, so that a case stays in its part when others come and go."""
    if not 1 <= index <= count:
        raise M3CheckError(f"shard {index}/{count}: the first number counts from 1 to the second")
    return [case for case in cases if _bucket(case, count) == index - 1]


def _bucket(case: Case, count: int) -> int:
    return int.from_bytes(hashlib.sha256(case_id(case).encode()).digest()[:8], "big") % count
