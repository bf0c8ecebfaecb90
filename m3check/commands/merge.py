"""`m3check merge RECORD...`: shards, or the parts of a run made on several machines, judged as one run."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from m3check.commands import github
from m3check.commands.options import options
from m3check.commands.talk import emit, talk
from m3check.config import TIME_LIMIT, RunOptions
from m3check.types import Evidence, Exit, M3CheckError, Record, Result

MERGED = "merged"
"""Name in a merged record's environment: the commands of its parts, so that a merge of merges knows all shards."""


@dataclass(frozen=True)
class Part:
    """What one merged record was asked for; `options` is None where its command cannot be read."""

    named: tuple[str, ...]
    options: RunOptions | None

    @property
    def require(self) -> Evidence | None:
        """The only evidence that counts, or None."""
        return self.options.require if self.options else None


def main(arguments: argparse.Namespace) -> int:
    """Write or print the merged record; the exit code is that of one run with all these results."""
    from m3check import ledger, report
    from m3check.report import files, jsonfile
    from m3check.report.merge import one_code, one_target

    records = [jsonfile.read(path) for path in arguments.records]
    one_target(records)
    one_code(records)
    records = [replace(record, results=tuple(map(ledger.restored, record.results))) for record in records]
    record = _judged(records, arguments)
    if arguments.out:
        folder = Path(arguments.out)
        files.check_writable(folder)
        report.write(record, folder)
    else:
        emit(jsonfile.dumps(record))
    github.tell(record)
    where = f"; report: {Path(arguments.out) / report.FILES['md']}" if arguments.out else ""
    talk(f"m3check: exit {record.exit.code}: {record.exit.reason}{where}")
    return record.exit.code


def _judged(records: Sequence[Record], arguments: argparse.Namespace) -> Record:
    """The merged record, by the strictest of the merged commands; a part that broke off or is lost is never made good."""
    from m3check import dispatched, power
    from m3check.gate import Gate, tier_cases
    from m3check.report.merge import merge, results_of
    from m3check.report.tally import GATE

    parts = [_part(command, record) for record in records for command in _commands(record)]
    told = [part.options for part in parts if part.options]
    gate = Gate(_options(records, parts, arguments))
    broken = next((record.exit for record in records if record.exit.code in (2, 3, 4)), None)
    lost = lost_shards(told)
    judged = gate.judge(results_of(records), tier_cases(told), whole=True, broken=bool(broken or lost))
    if broken:
        exit = Exit(broken.code, f"a merged record broke off: {broken.reason}")
    elif lost:
        exit = Exit(5, f"shards are missing: {', '.join(lost)}")
    else:
        exit = _verdict(parts, judged.results, gate.options.strict, [breach.sentence for breach in judged.breaches])
    words = ["m3check", "merge", *arguments.records]
    words += ["--ledger", str(gate.options.ledger)] if gate.options.ledger else []
    words += ["--floor", *gate.options.floors] if gate.options.floors else []
    words += ["--out", arguments.out] if arguments.out else []
    record = merge(records, judged.results, exit, shlex.join(words))
    facts = record.environment
    facts[MERGED] = [command for each in records for command in _commands(each)]
    facts["power"] = power.summary(judged.results)  # of the merged cases, not the sum of what overlaps
    facts["dispatch"] = dispatched.summary(record.arch, judged.results, facts.get("providers", {}))
    facts.pop(GATE, None)
    if gate.options.strict:
        facts["strict"] = True  # the command does not say so
    if judged.facts is not None:
        facts[GATE] = judged.facts
    return record


def _options(records: Sequence[Record], parts: Sequence[Part], arguments: argparse.Namespace) -> RunOptions:
    """What the merge is judged by: its own ledger and floors, else those that all of its parts were asked for."""
    from m3check.report.tally import strict

    named = tuple(dict.fromkeys(name for part in parts for name in part.named)) or ("triton",)
    words = argparse.Namespace(arch=records[0].arch, kernels=list(named), ledger=arguments.ledger, floor=arguments.floor)
    chosen = options(words)
    told = [part.options for part in parts if part.options]
    if chosen.ledger is None:
        chosen = replace(chosen, ledger=_same("ledger", {each.ledger for each in told}))
    if not chosen.floors:
        chosen = replace(chosen, floors=_same("floor", {each.floors for each in told}) or ())
    return replace(chosen, strict=chosen.strict or any(strict(record) for record in records))


def _same(word: str, values: set[Any]) -> Any:
    """The one value that the parts have; raises M3CheckError where they differ."""
    if len(values) > 1:
        raise M3CheckError(f"the records were made with different --{word}; say which one the merge is judged by")
    return next(iter(values), None)


def _verdict(parts: Sequence[Part], results: Sequence[Result], strict: bool, breaches: Sequence[str]) -> Exit:
    """One run's exit; where parts required different evidence, the worst of one for each."""
    from m3check.report.exits import judge

    exits = []
    for require in dict.fromkeys(part.require for part in parts):
        named = list(dict.fromkeys(name for part in parts if part.require == require for name in part.named))
        exits.append(judge(results, named, strict=strict, require=require, breaches=breaches))
    return min(exits, key=lambda exit: (1, 5, 0).index(exit.code))


def lost_shards(told: Sequence[RunOptions]) -> list[str]:
    """The shards that are missing, run by run: what differs in more than its shard is another run."""
    runs: dict[str, set[tuple[int, int]]] = {}
    for each in told:
        alike = replace(
            each, shard=(1, 1), jobs=0, timeout=TIME_LIMIT, resume=False, offline=False, ledger=None, floors=(), out=None
        )
        runs.setdefault(replace(alike, shown=frozenset()).command, set()).add(each.shard)
    lost = []
    for command, shards in runs.items():
        wanted = {n: [f"{i}/{n}" for i in range(1, n + 1) if (i, n) not in shards] for _, n in sorted(shards)}
        if all(wanted.values()):
            lost += [f"{', '.join(each)} of `{command}`" for each in wanted.values()]
    return lost


def _part(command: str, record: Record) -> Part:
    """What a record's command asked for; a run made through the Python API may be told by its results alone."""
    from m3check.cli import parser

    try:
        words = parser().parse_args(shlex.split(command)[1:])
        told = options(words, settings=False)
    except (M3CheckError, ValueError, TypeError, SystemExit):
        return Part(tuple(dict.fromkeys(result.provider for result in record.results)), None)
    return Part(told.kernels, told)


def _commands(record: Record) -> list[str]:
    """The command of a run; of a merge those of its parts."""
    merged = record.environment.get(MERGED)
    return [str(each) for each in merged] if isinstance(merged, list) and merged else [record.command]
