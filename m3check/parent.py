"""The parent's side of a run: what its workers are told and say, and the record that is made of their results."""

from __future__ import annotations

import datetime
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from m3check import cases, gate, runner
from m3check.report.jsonfile import SCHEMA_VERSION
from m3check.report.tally import GATE
from m3check.types import Evidence, M3CheckError, PlanLine, Record, Result, Status

if TYPE_CHECKING:
    from m3check.config import RunOptions


class Group(NamedTuple):
    """What a worker is bound to for life."""

    provider: str
    evidence: Evidence

    def __str__(self) -> str:
        return self.provider if self.evidence != "compiled" else f"{self.provider}, to be compiled,"


def worker_command(spec: str, arch: str, evidence: Evidence, device: int, offline: bool) -> dict[str, Any]:
    """What a worker is told to load, once."""
    return {"spec": spec, "arch": arch, "evidence": evidence, "device": device, "offline": offline}


def worker_environment(evidence: str) -> dict[str, str]:
    """Environment of a worker: one thread for each library, and the interpreter switched on before triton is imported."""
    one = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return {**one, "TRITON_INTERPRET": "1" if evidence == "interpreted" else "0"}


def default_jobs(evidence: str) -> int:
    """Workers at once: every core when interpreting; a few when they share one GPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 16) if evidence == "device" else cores


def circumstances(evidence: Evidence, why: str, jobs: int) -> dict[str, Any]:
    """What the parent process knows of a run when it begins, for its record."""
    return {
        "evidence": evidence,
        "evidence_reason": why,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "jobs": jobs,
    }


def introduced(hellos: Mapping[Group, Mapping[str, Any]]) -> dict[str, Any]:
    """Facts for the record from the workers' hellos; raises M3CheckError when one refused."""
    said = set()
    for group, hello in hellos.items():
        if "refused" in hello:
            raise M3CheckError(hello["refused"])
        for warning in hello["warnings"]:
            if (group.provider, warning) not in said:
                print(f"m3check: {group.provider}: {warning}", file=sys.stderr)
            said.add((group.provider, warning))
    repairs: Sequence[Mapping[str, Any]] = next((hello["repairs"] for hello in hellos.values() if hello["repairs"]), [])
    return {
        **next(iter(hellos.values()))["environment"],
        "providers": {group.provider: hello["description"] for group, hello in hellos.items()},
        "interpreter_repairs": [r["name"] for r in repairs if r["installed"]],
    }


def without_running(line: PlanLine, status: Status, reason: str, options: RunOptions) -> Result:
    """The result of a case that no worker answered for."""
    axes, command = cases.parse_id(line.case).axes(), runner.repro(line, options)
    return Result(line.case, line.op, line.provider, line.op, line.evidence, axes, status, reason, repro=command)


def record(
    options: RunOptions, judged: gate.Judgement, facts: dict[str, Any], interrupted: bool, command: str = ""
) -> Record:
    """The record of judged results; `facts` are its environment, `command` the line that asked for it (else a run's)."""
    from m3check import __version__
    from m3check.report import exits

    if judged.facts is not None:
        facts[GATE] = judged.facts
    verdict = exits.judge(
        judged.results,
        options.kernels,
        strict=options.strict,
        require=options.require,
        interrupted=interrupted,
        breaches=[breach.sentence for breach in judged.breaches],
        nothing="no case was selected" if judged.results or command else runner.why_none(options),
    )
    return Record(
        schema_version=SCHEMA_VERSION,
        tool={"name": "m3check", "version": __version__},
        arch=options.arch,
        environment=facts,
        command=command or options.command,
        exit=verdict,
        summary=exits.summarise(judged.results),
        results=judged.results,
    )
