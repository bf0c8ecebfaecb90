"""Floors: the least that a run must show to be green, however green its results are.

Written as words, alike on the command line, in the environment and in a record's command: `min_cases=10`,
`min_cases.sparse_attn=40`, `evidence=device`, `max_skipped=0`. In a settings file they are the table `[floors]`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from m3check.config import EVIDENCE, choose
from m3check.report.exits import belongs
from m3check.report.tally import SUFFICES
from m3check.types import OPS, SPARSE, Breach, M3CheckError, Result, Status

KEYS = ("min_cases", "evidence", "max_skipped", "max_known", "max_mistrusted", "max_inconclusive")
EACH = "each"
"""Stands for every block-sparse op and chain without a floor of its own; other families count where they are named."""
COMPUTED = ("device", "interpreted")
"""What counts as a case that ran where no evidence is asked for: cross-compilation computes nothing."""
NONE = "none"
"""The word that waives what was said before it."""

LIMITED = {
    "max_skipped": Status.SKIPPED,
    "max_known": Status.KNOWN,
    "max_mistrusted": Status.MISTRUSTED,
    "max_inconclusive": Status.INCONCLUSIVE,
}


def parse(words: Iterable[str]) -> dict[str, str]:
    """{key: value} of KEY=VALUE words, checked; `none` forgets what stands before it and is kept. Raises M3CheckError."""
    found: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if word == NONE:
            found = {NONE: ""}
        elif not equals:
            raise M3CheckError(f"{word!r} is no floor; wanted KEY=VALUE with one of {', '.join(KEYS)}, or {NONE}")
        else:
            found[key] = checked(key, value)
    return found


def from_table(table: Mapping[str, Any], arch: str) -> dict[str, str]:
    """{key: value} of a settings file's [floors], what [floors.ARCH] says of this target last. Raises M3CheckError."""
    from m3check.arch import ARCHS

    for key, value in table.items():
        choose("floor", key, (*KEYS, *ARCHS))
        if key in ARCHS and not isinstance(value, Mapping):
            raise M3CheckError(f"floors.{key} = {value!r} is not a table; wanted [floors.{key}] with floors in it")
    own = {name: _flat(inner) for name, inner in table.items() if name in ARCHS}
    return _flat({key: value for key, value in table.items() if key not in ARCHS}) | own.get(arch, {})


def checked(key: str, value: str) -> str:
    """The value of a floor as it is written again. Raises M3CheckError for what cannot be meant."""
    name, dot, op = key.partition(".")
    choose("floor", name, KEYS)
    if dot:
        if name != "min_cases":
            raise M3CheckError(f"floor {key}: only min_cases is said of one op")
        choose("op", op, (EACH, *OPS))
    if name == "evidence":
        return choose("evidence", value, EVIDENCE)
    if not (value.isascii() and value.isdigit()):
        raise M3CheckError(f"floor {key}={value}: wanted a whole number, 0 or more")
    return str(int(value))


def _flat(table: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in table.items():
        choose("floor", key, KEYS)
        inner = value if key == "min_cases" and isinstance(value, Mapping) else {"": value}
        for op, each in inner.items():
            name = f"{key}.{op}" if op else key
            if isinstance(each, bool) or not isinstance(each, (int, str)):
                raise M3CheckError(f"floor {name} = {each!r}: wanted {'a text' if key == 'evidence' else 'a whole number'}")
            found[name] = checked(name, str(each))
    return found


def limits(words: Iterable[str]) -> dict[str, str]:
    """{key: value} of the floors that stand after `none` has waived its share."""
    return {key: value for key, value in parse(words).items() if key != NONE}


def breaches(words: Iterable[str], results: Sequence[Result], named: Sequence[str]) -> list[Breach]:
    """What a whole run falls short of. Each provider that was named must reach each floor by itself."""
    asked = limits(words)
    told = _weak(results, asked["evidence"]) if "evidence" in asked else []
    for name in named:
        own = [r for r in results if belongs(r.provider, name)]
        told += _few(own, name, asked)
        for key, status in LIMITED.items():
            n = len(_cases(own, status))
            if key in asked and n > int(asked[key]):
                told.append(f"floor {key}={asked[key]}: {_count(n)} of {name} {'is' if n == 1 else 'are'} {status}")
    return [Breach(sentence) for sentence in told]


def _few(results: Sequence[Result], name: str, asked: Mapping[str, str]) -> list[str]:
    """Ops of one provider of which too few cases ran by the evidence that counts."""
    wanted = {key.partition(".")[2] or EACH: int(value) for key, value in asked.items() if key.startswith("min_cases")}
    kinds = SUFFICES[asked["evidence"]] if "evidence" in asked else COMPUTED
    ran = {(r.op, r.case) for r in results if r.status is not Status.SKIPPED and r.evidence in kinds}
    counts = Counter(op for op, _ in ran)
    least = {op: wanted.get(op, wanted.get(EACH, 0) if op in SPARSE else 0) for op in OPS}
    kind = f" with {asked['evidence']} evidence" if "evidence" in asked else ""
    return [
        f"floor min_cases: {op} ran {_count(counts[op])} on {name}{kind}, the floor is {n}"
        for op, n in least.items()
        if counts[op] < n
    ]


def _weak(results: Sequence[Result], wanted: str) -> list[str]:
    """Cases that ran, but by no evidence that suffices. What cannot be compiled, by a sentence, is not asked to be."""
    ran = [r for r in results if r.status is not Status.SKIPPED]
    enough = {(r.case, r.provider) for r in ran if r.evidence in SUFFICES[wanted]}
    if enough and wanted == "compiled":
        enough |= {(r.case, r.provider) for r in results if r.status is Status.SKIPPED and r.evidence == wanted}
    weak: dict[tuple[str, str], set[str]] = {}
    for r in ran:
        if (r.case, r.provider) not in enough:
            weak.setdefault((r.case, r.provider), set()).add(r.evidence)
    if not weak:
        return []
    kinds = " and ".join(sorted(set().union(*weak.values())))
    return [f"floor evidence={wanted}: {_count(len(weak))} {'is' if len(weak) == 1 else 'are'} {kinds} only"]


def _cases(results: Sequence[Result], status: Status) -> set[str]:
    """Ids of the cases with this status; skipped only where no kind of evidence has a result."""
    found = {r.case for r in results if r.status is status}
    return found - {r.case for r in results if r.status is not status} if status is Status.SKIPPED else found


def _count(n: int) -> str:
    return f"{n} case{'s' if n != 1 else ''}"
