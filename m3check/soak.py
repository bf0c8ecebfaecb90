"""Many seeds of the same cases, judged as a run judges them and told in few words: what shows only in a great number.

Invariants are left out: they show on any seed, and a run of the tier has them. A task is one case with some seeds, so that
a worker compiles and tunes its kernels once for all of them. References and checks run on the CPU unless asked for on the
device: they wait for it a hundred times a result, and processes that share one pay dearly for each.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from m3check import arch as arches
from m3check import cases, device, isolate, kernels, runner
from m3check.types import RED, STRICTLY_RED, Exit, Finding, M3CheckError, PlanLine, Result, Status

if TYPE_CHECKING:
    from m3check.config import RunOptions

CHUNK = 50
"""Seeds of one task."""

SECONDS = 4.0
"""That a seed of a task may take on average, at least."""

WHOLE = 10
"""Results of one task that did not pass and are kept in full; the others are counted."""


class Task(NamedTuple):
    """One case of one provider with seeds `first` … `last`."""

    line: PlanLine
    first: int
    last: int


@dataclass
class Tally:
    """What became of the results of one op and provider."""

    results: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    noted: int = 0
    """Results that carry notes as well."""
    worst: dict[str, tuple[float, str]] = field(default_factory=dict)
    """Of each check: the largest measured/limit, and the case that it was on."""
    seconds: float = 0.0

    def add(self, other: Tally) -> None:
        """Count in what another tally counted."""
        self.results += other.results
        self.statuses += other.statuses
        self.noted += other.noted
        self.seconds += other.seconds
        for check, (ratio, case) in other.worst.items():
            self._larger(check, ratio, case)

    def count(self, result: Result) -> None:
        """Count in one result."""
        self.results += 1
        self.statuses[str(result.status)] += 1
        self.noted += any(finding.status is Status.NOTED for finding in result.findings)
        self.seconds += result.seconds
        for finding in result.findings:
            ratio = _ratio(finding)
            if ratio is not None:
                self._larger(finding.check, ratio, result.case)

    def _larger(self, check: str, ratio: float, case: str) -> None:
        if check not in self.worst or ratio > self.worst[check][0]:
            self.worst[check] = ratio, case


def _ratio(finding: Finding) -> float | None:
    if finding.status is Status.NOTED or not finding.limit or finding.measured is None:
        return None
    return float(f"{finding.measured / finding.limit:.4g}")


@dataclass
class Soak:
    """What all seeds together gave."""

    arch: str
    command: str
    environment: dict[str, Any]
    seeds: tuple[int, int]
    asked: int
    """Results that were asked for; fewer came where the time was up."""
    tallies: dict[tuple[str, str], Tally] = field(default_factory=dict)
    """By op and provider."""
    others: list[Result] = field(default_factory=list)
    """Results that did not pass, in full."""
    exit: Exit = field(default_factory=lambda: Exit(5, "nothing ran"))

    @property
    def total(self) -> Tally:
        """All results."""
        total = Tally()
        for tally in self.tallies.values():
            total.add(tally)
        return total

    def data(self) -> dict[str, Any]:
        """What soak.json holds."""
        import msgspec

        return {
            "soak": 1,
            "arch": self.arch,
            "command": self.command,
            "environment": self.environment,
            "exit": asdict(self.exit),
            "seeds": list(self.seeds),
            "asked": self.asked,
            "results": self.total.results,
            "summary": dict(self.total.statuses),
            "noted": self.total.noted,
            "tallies": [{"op": op, "provider": provider, **told(tally)} for (op, provider), tally in self.tallies.items()],
            "others": msgspec.to_builtins(self.others),
        }


def told(tally: Tally) -> dict[str, Any]:
    """One tally as JSON-ready data."""
    worst = {check: {"ratio": ratio, "case": case} for check, (ratio, case) in sorted(tally.worst.items())}
    return {
        "results": tally.results,
        "summary": dict(tally.statuses),
        "noted": tally.noted,
        "seconds": round(tally.seconds, 1),
        "worst": worst,
    }


def heard(data: Mapping[str, Any]) -> Tally:
    """A tally from what `told` made of it."""
    worst = {check: (entry["ratio"], entry["case"]) for check, entry in data["worst"].items()}
    return Tally(data["results"], Counter(data["summary"]), data["noted"], worst, data["seconds"])


# In a worker.


def answer(session: runner.Session, message: Mapping[str, Any]) -> dict[str, Any]:
    """One task: its tally, and the first results that did not pass, in full."""
    import msgspec

    session = replace(session, judged_on=message.get("judged_on", ""))
    line = msgspec.convert(message["line"], PlanLine)
    case = cases.parse_id(line.case)
    first, last = message["seeds"]
    tally = Tally()
    others: list[Result] = []
    for seed in range(first, last + 1):
        each = replace(case, seed=seed)
        name = cases.case_id(each)
        command = f"{message['repro']} --case {name}"
        result = runner.run_one(each, session, replace(line, case=name, invariants=()), command)
        tally.count(result)
        if result.status is not Status.PASSED and len(others) < WHOLE:
            others.append(result)
        if result.status in RED and session.evidence == "device" and device.lost(session.device):
            return {"tally": told(tally), "others": msgspec.to_builtins(others), "spent": True}
    return {"tally": told(tally), "others": msgspec.to_builtins(others)}


# In the parent.


def run(
    options: RunOptions,
    seeds: tuple[int, int],
    minutes: float = 0.0,
    progress: Callable[[Soak], None] | None = None,
    judged_on: str = "cpu",
) -> Soak:
    """Run every case of a selection with seeds `seeds[0]` … `seeds[1]`, for so many minutes at most (0: no limit).

    `judged_on` is where references and checks run: `cpu`, or `device`, where the kernels ran. Raises M3CheckError for what
    the user can mend.
    """
    import msgspec

    from m3check import parent
    from m3check.config import choose

    choose("place to judge on", judged_on, ("cpu", "device"))
    first, last = seeds
    if not 1 <= first <= last:
        raise M3CheckError(f"--seeds {first}..{last} has no seed; the first that can be is 1: --seeds 1..100")
    started = time.monotonic()
    arch = arches.find_arch(options.arch)
    evidence, index, why = runner.evidence_for(arch)
    for text in options.kernels:
        kernels.prepare(kernels.parse_spec(text), options.offline)
    lines = [line for line in runner.plan(options) if line.skip is None and line.evidence == evidence]
    tasks: dict[parent.Group, list[Task]] = {}
    for task in _tasks(lines, first, last):
        tasks.setdefault(parent.Group(task.line.provider, evidence), []).append(task)
    jobs = options.jobs or min(6 if (evidence, judged_on) == ("device", "device") else 64, parent.default_jobs(evidence))
    facts = {
        **parent.circumstances(evidence, why, jobs),
        "judged_on": judged_on if evidence == "device" else "cpu",
        "tier": options.tier if not options.cases else "",
    }
    soak = Soak(arch.name, "", facts, seeds, len(lines) * (last - first + 1))

    def make(group: parent.Group) -> isolate.Worker:
        command = parent.worker_command(group.provider, arch.name, evidence, index, options.offline)
        return isolate.Worker(command, parent.worker_environment(evidence))

    def message(task: Task) -> dict[str, Any]:
        repro = f"m3check run --arch {options.arch} --kernels {task.line.provider}"
        where = "cpu" if (evidence, judged_on) == ("device", "cpu") else ""
        return {
            "line": msgspec.to_builtins(task.line),
            "seeds": [task.first, task.last],
            "repro": repro,
            "judged_on": where,
        }

    interrupted = False
    pool: isolate.Pool[parent.Group]
    with isolate.Pool(jobs, make, max(options.timeout, SECONDS * CHUNK)) as pool:
        try:
            if tasks:
                facts |= parent.introduced(pool.greet(list(tasks)))
            for task, reply in pool.run(tasks, message):
                _count(soak, task, reply, message(task)["repro"])
                if progress is not None:
                    progress(soak)
                if minutes and time.monotonic() - started > 60 * minutes:
                    facts["broken off after minutes"] = minutes
                    break
        except KeyboardInterrupt:
            interrupted = True
        except ChildProcessError as error:
            raise M3CheckError(str(error)) from error
    facts["seconds"] = round(time.monotonic() - started, 1)
    soak.exit = _judged(soak, options, interrupted)
    return soak


def _tasks(lines: list[PlanLine], first: int, last: int) -> Iterator[Task]:
    """Some seeds of every case before more of any, the dearest first: where time is up, all cases have had their share."""
    dear = sorted(lines, key=lambda line: -cases.cost(cases.parse_id(line.case), line.evidence))
    for start in range(first, last + 1, CHUNK):
        for line in dear:
            yield Task(line, start, min(last, start + CHUNK - 1))


def _count(soak: Soak, task: Task, reply: Any, repro: str) -> None:
    import msgspec

    line = task.line
    tally = soak.tallies.setdefault((line.op, line.provider), Tally())
    if isinstance(reply, isolate.Death):
        case = replace(cases.parse_id(line.case), seed=task.first)
        name = cases.case_id(case)
        reason = f"{reply.reason}; the task was this case with seeds {task.first} to {task.last}"
        result = Result(name, line.op, line.provider, line.op, line.evidence, case.axes(), Status(reply.kind), reason,
                        repro=f"{repro} --case {name}")  # fmt: skip
        tally.count(result)
        soak.others.append(result)
        return
    tally.add(heard(reply["tally"]))
    soak.others += msgspec.convert(reply["others"], list[Result])


def _judged(soak: Soak, options: RunOptions, interrupted: bool) -> Exit:
    """The exit code, by the rules of a run."""
    total = soak.total
    red = sum(total.statuses[str(status)] for status in RED)
    doubtful = sum(total.statuses[str(status)] for status in STRICTLY_RED) + total.noted
    if interrupted:
        return Exit(2, f"interrupted after {total.results} results")
    missing = [text for text in options.kernels if not any(provider == text for _, provider in soak.tallies)]
    if missing:
        return Exit(5, f"nothing ran for {', '.join(missing)}")
    if red:
        return Exit(1, f"{red} of {total.results} results are red")
    if options.strict and doubtful:
        return Exit(
            1, f"{doubtful} of {total.results} results are noted, mistrusted or inconclusive, which --strict makes red"
        )
    return Exit(0, f"{total.results} results, none is red")
