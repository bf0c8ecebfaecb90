"""What of production a run shows: the results, or a plan's cases, that are about each implementation of `dispatch`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from m3check.dispatch import LATEST, Axes, Row, not_run, rows, version_of
from m3check.types import OPS, PlanLine, Result, Status

_MSA_KERNEL = re.compile("fmha|sparse_topk_select|sparse_atten_func|cutedsl|cutlass")


def summary(arch: str, results: Iterable[Result], providers: Mapping[str, Any]) -> list[dict[str, str]]:
    """What production runs and what the results show of it: one entry for each version, op and implementation.

    `providers` is what the workers said of themselves, by provider. Where none of them is vLLM's, the entries are those of
    the latest, and say that no result is about them.
    """
    results = list(results)
    versions = {name: _version(name, providers) for name in _named(results)}
    told = []
    latest = ".".join(map(str, LATEST))
    for provider, text in versions.items() or [("", f"{latest}.0")]:
        version = version_of(text) or (99, 0)
        shown = text if version <= LATEST else f"{text or 'of unknown version'} (taken for {latest})"
        for op, row in rows(arch, version):
            about = [r for r in results if r.op == op and _is_of(r.provider, r.kernel, row, provider) and row.takes(r.axes)]
            told.append(
                {
                    "version": shown,
                    "op": op,
                    "implementation": row.name,
                    "file": row.file,
                    "when": row.when,
                    "evidence": _told(op, row, arch, about, provider),
                }
            )
    return told


def planned(arch: str, lines: Iterable[PlanLine], axes: Callable[[str], Axes]) -> list[tuple[str, str, str, str]]:
    """(op, implementation, when, what a plan would show of it) on a target; `axes` gives a case's, by its id."""
    lines = list(lines)
    named = next((line.provider for line in lines if line.provider.startswith("vllm")), "")
    told = []
    for op, row in rows(arch, version_of(_version(named, {})) or LATEST):
        about = [x for x in lines if x.op == op and _is_of(x.provider, "", row, named) and row.takes(axes(x.case))]
        due = {x.case for x in about if x.skip is None}
        if (row.needs and row.provider == "vllm") or op not in OPS or (row.needs and not due):
            would = _told(op, row, arch, [], named)
        elif not named and row.provider == "vllm":
            would = "no provider vllm is named"
        else:
            reasons = Counter(x.skip for x in about if x.skip).most_common(1)
            would = f"{len(due)} cases" if due else reasons[0][0] if reasons else "no case of this plan has it"
        told.append((op, row.name, row.when, str(would)))
    return told


def _named(results: Iterable[Result]) -> list[str]:
    return list(dict.fromkeys(r.provider for r in results if re.match(r"vllm(==|:|$)", r.provider)))


def _version(provider: str, providers: Mapping[str, Any]) -> str:
    """The version that a provider's name or its worker says; empty for none."""
    said = providers.get(provider)
    text = str(said.get("version", "")) if isinstance(said, Mapping) else ""
    return next((word for word in (provider.partition("==")[2], text) if version_of(word)), "")


def _is_of(name: str, kernel: str, row: Row, provider: str) -> bool:
    """Whether results of a provider's kernel are about a row, `provider` being the vLLM that was named.

    An installed vLLM runs MSA itself on a target that has it, under the names of MSA's functions.
    """
    if row.kernel:
        return name == provider and row.kernel in kernel
    msa = _MSA_KERNEL.search(kernel) is not None
    if row.provider == "vllm":
        return name == provider and not msa
    return (name == provider and msa) or re.split("[=:]", name)[0] == row.provider


def _told(op: str, row: Row, arch: str, about: list[Result], provider: str) -> str:
    """The evidence of a row, or the sentence why there is none."""
    if op not in OPS:
        return f"not run here: m3check has no op {op}"
    ran = any(r.status is not Status.SKIPPED for r in about) and (row.provider != "vllm" or row.kernel)
    if row.needs and not ran:
        return not_run(row, arch)
    return _evidence(about, provider if row.provider == "vllm" else row.provider)


def _evidence(results: Iterable[Result], provider: str) -> str:
    """Counts by evidence, or the sentence why there are none."""
    if not provider:
        return "not run here: no provider vllm was named"
    ran = [r for r in results if r.status is not Status.SKIPPED]
    if not ran:
        reasons = Counter(r.reason for r in results).most_common(1)
        return f"not run here: {reasons[0][0]}" if reasons else "not run here: no case of this run has it"
    parts = []
    for kind in ("device", "interpreted", "compiled"):
        counts = Counter(r.status.value for r in ran if r.evidence == kind)
        if counts:
            parts.append(f"{kind}: " + ", ".join(f"{n} {status}" for status, n in counts.items()))
    return "; ".join(parts)
