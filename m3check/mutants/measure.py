"""Measures the harness: every mutant meets the cases that can reach it and stops at its first red.

The cases, their plan lines and the judging are those of a run (`runner.plan`, `runner.run_one`). The warm parent keeps
inputs and reference results; a mutant's process inherits them. What a clean kernel executes, line by line, says which cases
can reach an edit, and how long it takes says when a mutant hangs.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m3check import arch as arches
from m3check import cases, kernels, runner
from m3check.config import RunOptions
from m3check.mutants import processes
from m3check.mutants.kept import keep
from m3check.mutants.mutant import Mutant, Outcome
from m3check.mutants.origins import sources
from m3check.mutants.sources import Sources, load
from m3check.types import OPS, RED, Case, M3CheckError, PlanLine, Status

SLOWER = 10.0
"""A mutant that computes this many times as long as the clean kernel hangs."""

LEAST = {"interpreted": 8.0, "device": 60.0}
"""Seconds that a case may take in any case; on a device they hold its compilation, which no clean kernel has paid for."""

SILENCE = {"interpreted": 600.0, "device": 150.0}
"""Seconds without a word after which a process is ended: a kernel that hangs on a device does not compute here."""

CONTROL_CASES = 3
"""Cases of each op that a control meets: the cheapest of those it suits, chains left out."""


@dataclass
class Clean:
    """What the correct kernel did on one case."""

    line: PlanLine
    case: Case
    seconds: float
    status: Status
    reason: str = ""
    covered: dict[str, frozenset[int]] = field(default_factory=dict)
    """Executed lines, by file; empty on a device, whose kernels cannot be watched."""


@dataclass
class Bench:
    """One provider, warm, with its cases measured on the clean kernel."""

    origin: Sources
    session: runner.Session
    clean: list[Clean]
    dropped: list[Clean]
    """Cases on which the clean kernel is not green: not used."""
    jobs: int
    kills: Counter[tuple[str, str]] = field(default_factory=Counter)

    def cases_for(self, mutant: Mutant) -> list[Clean]:
        """The cases that can reach a mutant, the most telling first: by kills so far of its like, then the cheapest."""
        found = [c for c in self.clean if self._reaches(mutant, c) and (mutant.suits is None or mutant.suits(c.case))]
        like = mutant.file or "".join(sorted(mutant.ops))
        found.sort(
            key=lambda c: (
                mutant.shown_by not in ("", *c.line.invariants),
                bool(OPS[c.case.op].chain),
                -self.kills[like, c.line.case] / (1 + c.seconds),
                c.seconds,
            )
        )
        if mutant.kind != "control":
            return found
        met: Counter[str] = Counter()
        few = []
        for clean in found:
            met[clean.case.op] += 1
            if met[clean.case.op] <= CONTROL_CASES and not OPS[clean.case.op].chain:
                few.append(clean)
        return few

    def _reaches(self, mutant: Mutant, clean: Clean) -> bool:
        if not mutant.edits or self.session.evidence == "device":
            return not mutant.ops or bool(mutant.ops & {clean.case.op, *OPS[clean.case.op].chain})
        first, last = mutant.lines
        return any(first <= line <= last for line in clean.covered.get(mutant.file, ()))


def found(options: RunOptions, text: str) -> Sources:
    """One provider's sources, fetched where need be; raises M3CheckError where it cannot be had."""
    spec = kernels.parse_spec(text)
    kernels.prepare(spec, options.offline)
    return sources(spec, arches.find_arch(options.arch), options.offline)


def bench(
    options: RunOptions, text: str, origin: Sources, mutants: Sequence[Mutant], jobs: int, told: Callable[[str], None]
) -> Bench:
    """Warm up for one provider and measure its clean kernels on what these mutants can meet."""
    arch = arches.find_arch(options.arch)
    evidence, index, _ = runner.evidence_for(arch)
    if evidence != "device":
        from triton import knobs

        if not knobs.runtime.interpret:
            raise M3CheckError("m3check mutants needs TRITON_INTERPRET=1 in the environment before triton is imported")
        from m3check import interpret

        broken = [r.name for r in interpret.install() if r.needed and not r.installed]
        if broken:
            raise M3CheckError(f"the interpreter could not be repaired here ({', '.join(broken)}): nothing can be measured")
    import torch

    torch.set_num_threads(1)
    session = runner.Session(arch, evidence, "cpu" if evidence != "device" else f"cuda:{index}", None)
    made = Bench(origin, session, [], [], jobs)
    lines = [line for line in runner.plan(options) if (line.provider, line.evidence, line.skip) == (text, evidence, None)]
    if not lines:
        raise M3CheckError(f"{text} has no case to measure with")
    batches = [[line] for line in lines]
    if evidence != "device":
        told(f"{text}: inputs and references of {len(lines)} cases")
        keep([cases.parse_id(line.case) for line in lines])
    else:
        lines = _telling(lines, mutants)
        batches = [lines[i::jobs] for i in range(min(jobs, len(lines)))]  # a process takes seconds to reach its GPU
    _warm(made, lines)
    gc.collect()
    gc.freeze()
    told(f"{text}: the clean kernels on {len(lines)} cases")

    def work(batch: list[PlanLine], send: processes.Send) -> None:
        made.session.loaded = load(made.origin, made.session.arch, made.session.evidence, None, Path())
        for line in batch:
            send(_clean(made, line))

    for child in processes.run(iter(batches), work, jobs, 900.0):
        for place, line in enumerate(child.task):
            case = cases.parse_id(line.case)
            if place >= len(child.messages):
                made.dropped.append(Clean(line, case, 0.0, Status.CRASHED, child.ended or "its process ended before it"))
                continue
            answer = child.messages[place]
            covered = {file: frozenset(lines) for file, lines in answer["covered"].items()}
            clean = Clean(line, case, answer["seconds"], Status(answer["status"]), answer["reason"], covered)
            (made.clean if clean.status is Status.PASSED else made.dropped).append(clean)
    made.clean.sort(key=lambda c: c.line.case)
    return made


def _telling(lines: Sequence[PlanLine], mutants: Sequence[Mutant]) -> list[PlanLine]:
    """The cases that mutants of a device meet: what shows their invariants, and else the cheapest of each op that suit."""
    if any(mutant.kind != "control" and mutant.where != "device" for mutant in mutants):
        return list(lines)
    chosen: set[str] = set()
    ranked = sorted(lines, key=lambda line: cases.cost(cases.parse_id(line.case), "device"))
    for mutant in mutants:
        met: Counter[str] = Counter()
        for line in ranked:
            if mutant.ops and not mutant.ops & {line.op, *OPS[line.op].chain}:
                continue
            if mutant.shown_by:
                chosen.update({line.case} if mutant.shown_by in line.invariants else ())
            elif not OPS[line.op].chain and (mutant.suits is None or mutant.suits(cases.parse_id(line.case))):
                met[line.op] += 1
                chosen.update({line.case} if met[line.op] <= CONTROL_CASES else ())
    return [line for line in lines if line.case in chosen]


def _warm(made: Bench, lines: Sequence[PlanLine]) -> None:
    """One clean case of each op, so that all that judging imports is here before a process is forked.

    A device must not be touched by the parent: a process that is forked afterwards could not use it.
    """
    from m3check import checks, device, reference, rerun  # noqa: F401
    from m3check.cases import generate  # noqa: F401
    from m3check.kernels import overlap, replay  # noqa: F401

    if made.session.evidence == "device":
        import triton  # noqa: F401

        return
    made.session.loaded = load(made.origin, made.session.arch, made.session.evidence, None, Path())
    cheapest = sorted(lines, key=lambda line: (len(line.invariants), cases.cost(cases.parse_id(line.case), "interpreted")))
    for line in {line.op: line for line in reversed(cheapest)}.values():
        runner.run_one(cases.parse_id(line.case), made.session, line, "")


def measure(made: Bench, mutants: Sequence[Mutant]) -> Iterator[Outcome]:
    """What becomes of each mutant, as it is known."""

    def tasks() -> Iterator[tuple[Mutant, list[Clean]]]:
        for mutant in mutants:
            yield mutant, made.cases_for(mutant)

    def work(task: tuple[Mutant, list[Clean]], send: processes.Send) -> None:
        _meet(made, *task, send)

    for child in processes.run(tasks(), work, made.jobs, SILENCE[made.session.evidence]):
        mutant, chosen = child.task
        outcome = _outcome(mutant, chosen, child)
        if outcome.verdict == "killed" and outcome.case:
            made.kills[mutant.file or "".join(sorted(mutant.ops)), outcome.case] += 1
        yield outcome


def _meet(made: Bench, mutant: Mutant, chosen: list[Clean], send: processes.Send) -> None:
    """In the mutant's process: load it and show it case after case, until one is red."""
    if not chosen:
        send({"unreached": True})
        return
    with tempfile.TemporaryDirectory(prefix="m3check-mutant-") as folder:
        processes.limit(60.0)
        try:
            made.session.loaded = load(made.origin, made.session.arch, made.session.evidence, mutant, Path(folder))
        except Exception as error:
            send({"invalid": f"{type(error).__name__}: {error}"})
            return
        for clean in chosen:
            send({"begin": clean.line.case})
            processes.limit(max(LEAST[made.session.evidence], SLOWER * clean.seconds))
            result = runner.run_one(clean.case, made.session, clean.line, "")
            processes.limit(0)
            if result.status in RED:
                check = next((f.check for f in result.findings if f.status is Status.FAILED), "error")
                if result.reason.startswith("m3check itself"):
                    check = "harness error"
                send({"red": check, "reason": result.reason[:400]})
                return
    send({"green": True})


def _outcome(mutant: Mutant, chosen: list[Clean], child: processes.Child) -> Outcome:
    seconds = 0.0
    begun = [m["begin"] for m in child.messages if "begin" in m]
    last = child.messages[-1] if child.messages else {}
    dead, alive = ("red", "green") if mutant.kind == "control" else ("killed", "survived")
    case = begun[-1] if begun else ""
    if "invalid" in last:
        return Outcome(mutant, "invalid", detail=last["invalid"][:300])
    if "unreached" in last:
        return Outcome(mutant, "unreached", detail="no case of this tier executes it")
    if "green" in last and not child.ended:
        return Outcome(mutant, alive, cases=len(begun), seconds=seconds)
    if "red" in last:
        return Outcome(mutant, dead, last["red"], case, last["reason"], len(begun), seconds)
    check = "timeout" if child.ended == "timeout" else "crashed"
    if not begun:
        return Outcome(mutant, "invalid", detail=f"loading it: {child.ended}")
    return Outcome(mutant, dead, check, case, child.ended, len(begun), seconds)


def _clean(made: Bench, line: PlanLine) -> dict[str, Any]:
    """One case on the clean kernel, watched line by line where it is interpreted."""
    case = cases.parse_id(line.case)
    started = time.process_time()
    if made.session.evidence == "device":
        result = runner.run_one(case, made.session, line, "")
        covered: dict[str, set[int]] = {}
    else:
        with _watched(made.origin) as covered:
            result = runner.run_one(case, made.session, line, "")
    return {
        "seconds": time.process_time() - started,
        "status": result.status,
        "reason": result.reason,
        "covered": {file: sorted(found) for file, found in covered.items()},
    }


@contextmanager
def _watched(origin: Sources) -> Iterator[dict[str, set[int]]]:
    """Collect the executed lines of a provider's files, rewritten by the interpreter or not."""
    files = {str(origin.path(file)): file for file in origin.files}
    covered: dict[str, set[int]] = {}

    def trace(frame: Any, event: str, argument: Any) -> Any:
        file = files.get(frame.f_code.co_filename)
        if file is None:
            return None
        found = covered.setdefault(file, set())

        def local(frame: Any, event: str, argument: Any) -> Any:
            if event == "line":
                found.add(frame.f_lineno)
            return local

        return local

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield covered
    finally:
        sys.settrace(before)


def at_a_time(evidence: str) -> int:
    """How many processes to run at a time: two on CPUs, and as many as may share one GPU."""
    return min(6 if evidence == "device" else 2, len(os.sched_getaffinity(0)))
