"""report.md: one record for a reader, what matters first. A pure function of the record."""

from __future__ import annotations

import statistics
from collections import Counter

from m3check.report import compiled, tally, targets
from m3check.report.tables import (
    EVIDENCE_RANK,
    cell,
    code,
    computed,
    evidence_of,
    figure,
    flat,
    groups,
    in_op_order,
    machine,
    ran,
    ratio,
    table,
)
from m3check.report.tally import GATE, breaches, red_word, strict, verdict
from m3check.types import Finding, Record, Result, Status

DETAILED = 40
"""Failures told in full; the others get a line each."""


def render(record: Record) -> str:
    """The whole report."""
    sections = (
        head,
        gate,
        summary,
        failures,
        targets.production,
        compiled.kernels,
        margins,
        targets.sums,
        power,
        notes,
        doubts,
        skips,
        environment,
    )
    return "\n\n".join(text for section in sections if (text := section(record))) + "\n"


def head(record: Record) -> str:
    """Arch, verdict, evidence and machine; for anything but a run on the hardware, plainly that it was none."""
    lines = [f"# m3check {record.arch}: {verdict(record)}", "", f"Exit {record.exit.code}: {cell(record.exit.reason)}.", ""]
    return "\n".join([*lines, evidence_sentence(record)])


def evidence_sentence(record: Record) -> str:
    """What kind of evidence the results are, and what they cannot say."""
    arch, kinds = record.arch, evidence_of(record)
    sentences = {
        "device": f"Evidence `device`: ran on {arch} hardware ({cell(machine(record, 'device'))}).",
        "interpreted": "Evidence `interpreted`: Triton's interpreter ran the kernels on a CPU "
        f"({cell(machine(record, 'interpreted'))}); "
        f"what {arch}'s compiler and matrix units do was not seen.",
        "compiled": f"Evidence `compiled`: cross-compiled for {arch} and not run.",
    }
    told = [sentences[kind] for kind in kinds]
    if "device" not in kinds:
        told.insert(0, f"**Nothing here ran on {arch} hardware.**")
    if not kinds:
        told.append("No result at all.")
    reason = record.environment.get("evidence_reason")
    if reason and "device" not in kinds:
        told.append(f"Why: {cell(reason)}.")
    return " ".join(told)


def gate(record: Record) -> str:
    """What ledger and floors say of the run as a whole, breaches first."""
    facts = tally.gate(record)
    if not facts:
        return ""
    lines = [f"- **{cell(breach.sentence)}**" for breach in breaches(record)]
    lines += [f"- not judged here: {cell(sentence)}" for sentence in facts.get("waiting") or ()]
    if facts.get("ledger"):
        known = facts.get("known", 0)
        lines.append(f"- ledger {code(str(facts['ledger']))}: {known} known failure{'s' if known != 1 else ''}")
    if facts.get("floors"):
        lines.append(f"- floors: {code(' '.join(map(str, facts['floors'])))}")
    return "## Gate\n\n" + "\n".join(lines)


def summary(record: Record, short: bool = False) -> str:
    """Op × provider × status; where `short`, several ops that a provider skipped altogether share a row."""
    rows, seen = [], [s for s in Status if s.value in record.summary]
    listed = list(groups(record.results))
    idle: dict[str, list[tuple[str, list[Result]]]] = {}
    for op, provider, every in listed if short else ():
        if not any(ran(r) for r in every):
            idle.setdefault(provider, []).append((op, every))
    idle = {provider: skipped for provider, skipped in idle.items() if len(skipped) > 1}
    for op, provider, every in listed:
        if op in dict(idle.get(provider, ())):
            continue
        for kind in sorted({r.evidence for r in every}, key=lambda kind: -EVIDENCE_RANK[kind]):
            results = [r for r in every if r.evidence == kind]
            counts = Counter(r.status for r in results)
            counts[Status.NOTED] = _noted(results)
            shown = kind if any(ran(r) for r in results) else "–"
            rows.append([op, provider, shown, *(counts[s] or "" for s in seen), len(results)])
    for provider, skipped in idle.items():
        results = [r for _, every in skipped for r in every]
        counts = Counter(r.status for r in results)
        rows.append([f"{len(skipped)} other ops", provider, "–", *(counts[s] or "" for s in seen), len(results)])
    if not rows:
        return ""
    headers = ["op", "provider", "evidence", *(s.value for s in seen), "results"]
    totals = ["all", "", "", *(record.summary[s.value] for s in seen), len(record.results)]
    text = table(headers, [*rows, totals], right=headers[3:])
    aside = (
        "\n\n`noted` counts results that also carry notes: it overlaps the other columns." if _noted(record.results) else ""
    )
    return f"## Summary\n\n{text}{aside}"


def failures(record: Record) -> str:
    """Everything that made the run red: place, measured and limit, hint and repro."""
    stern = strict(record)
    red = [r for r in record.results if red_word(r, stern)]
    if not red:
        return ""
    parts = [f"## Red ({len(red)})"]
    if len(red) > 5:
        counts = Counter((r.op, r.provider, _cause(r, stern)) for r in red)
        rows = [(n, *key) for key, n in counts.most_common()]
        parts.append(table(["results", "op", "provider", "cause"], rows, right=["results"]))
    parts += [_failure(result, stern) for result in red[:DETAILED]]
    if red[DETAILED:]:
        others = [(red_word(r, stern), r.op, r.provider, _cause(r, stern), code(r.case)) for r in red[DETAILED:]]
        parts.append("### And in short\n\n" + table(["status", "op", "provider", "cause", "case"], others))
    return "\n\n".join(parts)


def margins(record: Record) -> str:
    """Soundness: how much of its limit each check used where it passed."""
    found: dict[tuple[str, str], list[tuple[float, Result]]] = {}
    exact: Counter[tuple[str, str]] = Counter()
    results = [r for r in record.results if computed(r)]  # what compiling measured has a table of its own
    for result in results:
        for finding in result.findings:
            if finding.status is not Status.PASSED:
                continue
            used = ratio(finding)
            if used is None:
                exact[finding.check, result.op] += 1
            else:
                found.setdefault((finding.check, result.op), []).append((used, result))
    rows = []
    for check in dict.fromkeys(f.check for r in results for f in r.findings):
        for op in in_op_order(r.op for r in results):
            if used_by := found.get((check, op)):
                used, result = max(used_by, key=lambda pair: pair[0])
                middle = statistics.median(pair[0] for pair in used_by)
                rows.append((check, op, len(used_by), figure(middle), figure(used), result.provider, code(result.case)))
            if exact[check, op]:
                rows.append((check, op, exact[check, op], "exact", "exact", "", ""))
    if not rows:
        return ""
    text = (
        "How much of what correct arithmetic can explain was used, over findings that passed. `exact`: nothing may differ."
    )
    headers = ["check", "op", "passed", "median", "worst", "of", "case"]
    return f"## Worst measured/limit\n\n{text}\n\n{table(headers, rows, right=headers[2:5])}"


def power(record: Record) -> str:
    """Named defects, and how many cases of this run would have refused each."""
    facts = record.environment.get("power")
    if not isinstance(facts, dict) or not facts.get("defects"):
        return ""
    rows = [
        (stage, words, changed, seen, "" if seen or not changed else "**by no case**")
        for stage, words, seen, changed in facts["defects"]
    ]
    text = (
        "Would a wrong answer have passed? Each defect is the reference on changed inputs, judged by the same checks on "
        f"{facts['cases']} cases of this run. `changed`: cases where it changes the right answer; `seen`: those of them "
        "that would have been red; in the others it cannot be told from rounding."
    )
    if facts.get("unlisted"):
        text += f" {facts['unlisted']} more cases are not in the table."
    headers = ["stage", "defect", "changed", "seen", ""]
    return f"## Power\n\n{text}\n\n{table(headers, rows, right=headers[2:4])}"


def notes(record: Record) -> str:
    """What breaks the contract where the provider promises nothing."""
    found: dict[tuple[str, str, str, str], list[tuple[Result, Finding]]] = {}
    for result in record.results:
        for finding in result.findings:
            if finding.status is Status.NOTED:
                found.setdefault((result.provider, result.op, finding.check, finding.hint), []).append((result, finding))
    rows = [(len(hits), *key, hits[0][1].where, code(hits[0][0].case)) for key, hits in found.items()]
    if not rows:
        return ""
    text = "Breaks the contract where the provider promises nothing; red under `--strict` only."
    headers = ["times", "provider", "op", "check", "what", "first at", "first case"]
    return f"## Noted\n\n{text}\n\n{table(headers, rows, right=['times'])}"


def doubts(record: Record) -> str:
    """Results that are neither red nor a pass."""
    found: dict[tuple[str, str, str, str], list[Result]] = {}
    for r in record.results:
        if r.status in (Status.KNOWN, Status.MISTRUSTED, Status.INCONCLUSIVE):
            found.setdefault((r.status.value, r.provider, r.op, r.reason), []).append(r)
    rows = [(len(results), *key, code(results[0].case)) for key, results in found.items()]
    if not rows:
        return ""
    headers = ["results", "status", "provider", "op", "reason", "first case"]
    return "## Neither red nor passed\n\n" + table(headers, rows, right=["results"])


def skips(record: Record) -> str:
    """What did not run, by sentence."""
    found: dict[str, list[Result]] = {}
    for result in record.results:
        if result.status is Status.SKIPPED:
            found.setdefault(result.reason, []).append(result)
    rows = []
    for reason, results in sorted(found.items(), key=lambda item: (-len(item[1]), item[0])):
        ops = ", ".join(in_op_order(r.op for r in results))
        rows.append((len(results), reason, ops, ", ".join(dict.fromkeys(r.provider for r in results))))
    return "## Skipped\n\n" + table(["cases", "why", "ops", "providers"], rows, right=["cases"]) if rows else ""


def environment(record: Record) -> str:
    """Where, when and with what; the command that makes it again."""
    facts = {name: value for name, value in record.environment.items() if name not in ("power", GATE, targets.DISPATCH)}
    rows = [("m3check", record.tool.get("version", "")), *flat(facts)]
    return f"## Environment\n\n{table(['what', 'value'], rows)}\n\n```\n{record.command}\n```"


def _noted(results: list[Result] | tuple[Result, ...]) -> int:
    return sum(any(f.status is Status.NOTED for f in r.findings) for r in results)


def telling(result: Result, stern: bool) -> list[Finding]:
    """The findings that made a result red."""
    wanted = {Status.FAILED, Status.ERROR}
    if stern:
        wanted |= {Status.NOTED, Status.MISTRUSTED, Status.INCONCLUSIVE}
    return [f for f in result.findings if f.status in wanted]


def sentence(finding: Finding) -> str:
    """A finding in one line: check, measured > limit, where, hint."""
    parts = [finding.check]
    if finding.measured is not None:
        parts.append(f"{figure(finding.measured)}{_against(finding)}")
    text = ": ".join(parts) + (f" at {finding.where}" if finding.where else "")
    return text + (f" ({finding.hint})" if finding.hint else "")


def _against(finding: Finding) -> str:
    if finding.limit is None or finding.measured is None:
        return ""
    return f", limit {figure(finding.limit)}" if finding.measured <= finding.limit else f" > {figure(finding.limit)}"


def _cause(result: Result, stern: bool) -> str:
    told = telling(result, stern)
    return told[0].check if told else result.reason


def _failure(result: Result, stern: bool) -> str:
    lines = [
        f"### {red_word(result, stern).upper()} {result.op} · {cell(result.provider)}",
        "",
        f"- case: {code(result.case)}",
    ]
    lines.append(f"- kernel: {code(result.kernel)}, {result.evidence}")
    told = telling(result, stern)
    if result.reason and not told:
        lines.append(f"- reason: {cell(result.reason)}")
    for f in told:
        lines += [
            f"- check `{f.check}`: measured {figure(f.measured)}, limit {figure(f.limit)}",
            *([f"  - where: {cell(f.where)}"] if f.where else []),
            *([f"  - hint: {cell(f.hint)}"] if f.hint else []),
        ]
    lines.append(f"- repro: {code(result.repro)}")
    return "\n".join(lines)
