"""`m3check mutants`: wrong kernels on purpose, and how many of them a tier turns red."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m3check.commands.talk import emit, talk
from m3check.config import RunOptions
from m3check.types import OPS, M3CheckError

if TYPE_CHECKING:
    from m3check.mutants.forms import Row
    from m3check.mutants.mutant import Mutant, Outcome
    from m3check.mutants.sources import Sources


def main(arguments: argparse.Namespace) -> int:
    """Measure, print the scores and what survived; 0 if nothing survives unreviewed and every control is green."""
    from m3check import arch as arches
    from m3check import runner
    from m3check.mutants import processes, tables
    from m3check.mutants.review import elsewhere, judged, reviewed

    specs = tuple(arguments.kernels or ["triton"])
    options = RunOptions(
        arch=arguments.arch or "sm90",
        kernels=specs,
        ops=tuple(arguments.op or ()),
        tier=arguments.tier or "smoke",
        expr=arguments.k or "",
        offline=arguments.offline,
    )
    processes.ask_for_devices()
    evidence, _, why = runner.evidence_for(arches.find_arch(options.arch))
    if evidence != "device":
        _interpret()
    talk(f"m3check: {why}")
    entries, places = reviewed(), elsewhere()
    started = time.monotonic()
    outcomes: list[Outcome] = []
    without: dict[str, list[Row]] = {}
    dropped: list[str] = []

    def known(outcome: Outcome) -> None:
        outcomes.append(judged(outcome, entries, places))
        if arguments.json:
            _write(Path(arguments.json), [tables.data(o) for o in outcomes])

    for text in specs:
        without[text], unused = _one(options, text, evidence, arguments, known)
        dropped += unused
    controls = [o for o in outcomes if o.mutant.kind == "control"]
    wrong = [o for o in outcomes if o.verdict in ("survived", "unreached")]
    alarms = [o for o in controls if o.verdict != "green"]
    emit(tables.summary(outcomes))
    emit(f"\nkilled by: {tables.checks(outcomes)}")
    if controls:
        emit(f"negative controls: {len(controls) - len(alarms)} of {len(controls)} green")
    for outcome in (*alarms, *wrong, *(o for o in outcomes if o.verdict in ("accepted", "equivalent"))):
        emit("- " + tables.line(outcome))
    for row in dict.fromkeys(row for rows in without.values() for row in rows):
        emit(f"- not made: {tables.without(row)}")
    for sentence in dropped:
        emit(f"- case not used: {sentence}")
    talk(f"m3check: {len(outcomes)} mutants in {time.monotonic() - started:.0f} s, tier {options.tier}")
    if not outcomes:
        raise M3CheckError("no mutant was chosen")
    return 1 if wrong or alarms else 0


def _write(file: Path, data: list[dict[str, Any]]) -> None:
    """The whole file anew, in one step: a measurement that is interrupted leaves what it knew."""
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    part.replace(file)


def _one(
    options: RunOptions, text: str, evidence: str, arguments: argparse.Namespace, known: Callable[[Outcome], None]
) -> tuple[list[Row], list[str]]:
    """Measure one provider, telling each outcome as it is known: catalogue rows without a mutant, cases not used."""
    from m3check.mutants import measure, tables

    origin = measure.found(options, text)
    chosen, without = choose(origin, evidence, arguments)
    jobs = arguments.jobs or measure.at_a_time(evidence)
    made = measure.bench(options, text, origin, chosen, jobs, lambda words: talk(f"m3check: {words}"))
    talk(f"m3check: {text}: {len(chosen)} mutants, {len(made.clean)} cases")
    for count, outcome in enumerate(measure.measure(made, chosen), start=1):
        known(outcome)
        talk(f"[{count}/{len(chosen)}] {tables.line(outcome)}")
    unused = [f"{text} {c.line.case}: the clean kernel is {c.status}: {c.reason}" for c in made.dropped]
    return without, unused


def choose(origin: Sources, evidence: str, arguments: Any) -> tuple[list[Mutant], list[Row]]:
    """The mutants that a command line asks for, and the catalogue rows that have none here."""
    from m3check.mutants import catalogue, controls, generic, sampled, standard

    rows, without = catalogue.mutants(origin, evidence)
    edits = [m for file in origin.files for m in generic.mutants(origin.name, file, origin.read(file), origin.reach)]
    words = [word.lower() for word in arguments.only or ()]

    def named(some: list[Mutant]) -> list[Mutant]:
        return [m for m in some if not words or any(_named(m, word) for word in words)]

    edits = named(edits)  # first: a sample is one of what is asked for
    if arguments.sample is not None:
        edits = sampled(edits, arguments.sample, arguments.seed or 0)
    elif not arguments.all:
        edits = standard(edits)
    chosen = [*named([*rows, *controls.controls(origin)]), *edits]
    if arguments.op:
        ops = {part for op in arguments.op for part in (op, *OPS[op].chain)}
        chosen = [m for m in chosen if not m.ops or m.ops & ops]
    return chosen, without


def _named(mutant: Mutant, word: str) -> bool:
    """Whether --only asks for a mutant; `device` means where it shows."""
    return mutant.where == "device" if word == "device" else word in _described(mutant)


def _described(mutant: Mutant) -> str:
    family = "" if mutant.kind in ("catalogue", "control") else "generic "
    return f"{family}{mutant.kind} {mutant.key} {mutant.name} {mutant.text}".lower()


def _interpret() -> None:
    """Turn Triton's interpreter on for this process, before anything imports triton."""
    if "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
