"""The public Python interface, which the command line uses too: plan, run, verify, cases, load_record."""

from __future__ import annotations

import contextlib
import datetime
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m3check import arch as arches
from m3check import cases as _cases
from m3check import dispatched, gate, isolate, journal, kernels, parent, power, runner, sanitize
from m3check import invariants as _invariants
from m3check.compiled.report import told_once
from m3check.report import FILES
from m3check.types import OPS, Case, Kernel, M3CheckError, PlanLine, Profile, Record, Result, Status

if TYPE_CHECKING:
    from m3check.config import RunOptions


def plan(options: RunOptions | None = None, /, **flags: Any) -> list[PlanLine]:
    """What a run would do, with the reason for everything that it would skip; `flags` are the fields of RunOptions.

    No kernel code runs. Raises M3CheckError for what the user can mend: an unknown name, an expression that does not parse.
    """
    return runner.plan(_options(options, flags))


def _options(options: RunOptions | None, flags: dict[str, Any]) -> RunOptions:
    from m3check.config import RunOptions

    return options if options is not None else RunOptions(**flags)


def load_record(path: str | Path) -> Record:
    """Read a report.json; raises M3CheckError for a file that is none."""
    from m3check.report import jsonfile

    return jsonfile.read(Path(path))


def verify(
    case: Case | str,
    kernel: Callable[..., Any] | Kernel,
    profile: Profile | None = None,
    *,
    invariants: bool = True,
) -> Result:
    """Judge one kernel on one case in this process, on the GPU if there is one that m3check knows, else on the CPU.

    `case` is a Case or its id. `kernel` is a function with the keywords of its op (`m3check kernels --signatures` has their
    shapes and dtypes) or a loaded Kernel; `profile` says what a function needs and promises (default: `Profile()`). It is
    called again for every invariant that fits the case, as `m3check run --case` does, unless that takes half a minute or
    `invariants` is False. To run on a CPU, a Triton kernel needs TRITON_INTERPRET=1 in the environment before triton is
    imported.

    What the kernel does wrong, exceptions included, is told in the Result (`.check()` raises Mismatch). M3CheckError is
    raised for an id that is none, a case that makes no sense, and a function for a chain.
    """
    case = _cases.parse_id(case) if isinstance(case, str) else case
    if not isinstance(case, Case):
        raise M3CheckError(f"verify wants a Case or its id first, then the kernel; got {type(case).__name__}")
    function = None
    if not isinstance(kernel, Kernel):
        function = kernel
        if OPS[case.op].chain:
            raise M3CheckError(f"verify needs a loaded Kernel for the chain {case.op}; a function serves one of its ops")
        kernel = Kernel("user", case.op, getattr(kernel, "__name__", case.op), profile or Profile(), kernel)
    found = [(index, name) for index, name in arches.present() if name in arches.ARCHS]
    unrepaired: list[str] = []
    if not found:
        os.environ.setdefault("TRITON_INTERPRET", "1")
        from m3check import interpret

        # Triton without its interpreter cannot run here; a kernel in plain torch needs neither.
        with contextlib.suppress(RuntimeError):
            unrepaired = [r.detail for r in interpret.install() if r.needed and not r.installed]
    arch = arches.find_arch(found[0][1] if found else "sm90")
    session = runner.Session(
        arch,
        "device" if found else "interpreted",
        f"cuda:{found[0][0]}" if found else "cpu",
        kernels.Loaded.of({case.op: kernel}),
        unrepaired,
    )
    seconds = _cases.cost(case, session.evidence)
    names = _invariants.affordable(case, session.evidence, seconds) if invariants else ()
    line = PlanLine(_cases.case_id(case), case.op, kernel.provider, session.evidence, None, names)
    return runner.run_one(case, session, line, _shown_again(function, line, arch.name, profile))


def _shown_again(function: Callable[..., Any] | None, line: PlanLine, arch: str, profile: Profile | None) -> str:
    """The command that runs a function again, where m3check would find it by its file and judge it likewise; else empty."""
    from m3check.kernels.user import ALIAS

    module = sys.modules.get(getattr(function, "__module__", None) or "")
    name, path = getattr(function, "__name__", ""), getattr(module, "__file__", None)
    if path is None or name not in (line.op, ALIAS + line.op) or getattr(module, name, None) is not function:
        return ""
    if (getattr(module, "PROFILE", None) or Profile()) != (profile or Profile()):
        return ""
    with contextlib.suppress(ValueError):
        path = os.path.join(".", Path(path).resolve().relative_to(Path.cwd()))
    return f"m3check run --arch {arch} --kernels {shlex.quote(str(path))} --case {line.case}"


def _key(line: PlanLine) -> journal.Key:
    return line.case, line.provider, line.evidence


def run(options: RunOptions | None = None, /, **flags: Any) -> Record:
    """Run the plan in worker processes, journal each result, and return the record (the caller writes the reports).

    `flags` are the fields of RunOptions: `m3check.run(arch="sm90", kernels=("triton",), tier="smoke")`.
    Raises M3CheckError for what the user can mend: an unknown name, a provider that cannot be found or loaded.
    """
    options = _options(options, flags)
    arch = arches.find_arch(options.arch)
    evidence, device, why = runner.evidence_for(arch)
    gated = gate.Gate(options)  # a ledger that cannot be read must not cost a night
    for text in options.kernels:  # fetched first: a plan knows a wheel's kernels only once they are in the cache
        for warning in kernels.prepare(kernels.parse_spec(text), options.offline):
            print(f"m3check: {text}: {warning}", file=sys.stderr)
    lines = runner.plan(options)
    sanitized = sanitize.Workers(options.sanitize, evidence, why) if options.sanitize else None
    if sanitized is not None:
        lines = [replace(line, invariants=()) for line in lines]
    started = datetime.datetime.now(datetime.UTC)
    results: dict[journal.Key, Result] = {}
    for line in lines:
        if line.skip is not None:
            results[_key(line)] = parent.without_running(line, Status.SKIPPED, line.skip, options)
    due = [line for line in lines if line.skip is None]
    groups = list(dict.fromkeys(parent.Group(line.provider, line.evidence) for line in due))
    jobs = options.jobs or parent.default_jobs(evidence)
    facts = {
        **parent.circumstances(evidence, why, jobs),
        "tier": options.tier if not options.cases else "",
        **({"sanitize": options.sanitize} if options.sanitize else {}),
    }

    def make(group: parent.Group) -> isolate.Worker:
        command = parent.worker_command(group.provider, arch.name, group.evidence, device, options.offline)
        new = sanitized.make if sanitized is not None else isolate.Worker
        return new(command, parent.worker_environment(group.evidence))

    interrupted = False
    pool: isolate.Pool[parent.Group]
    with isolate.Pool(jobs, make, options.timeout * (sanitize.SLOWER if options.sanitize else 1)) as pool:
        try:
            if due:
                facts |= parent.introduced(pool.greet(groups))
                _run_due(pool, due, results, facts, options)
        except KeyboardInterrupt:
            interrupted = True
        except ChildProcessError as error:
            raise M3CheckError(str(error)) from error
    facts["seconds"] = round((datetime.datetime.now(datetime.UTC) - started).total_seconds(), 1)
    ordered = told_once([results[k] for line in lines if (k := _key(line)) in results])
    facts["power"] = power.summary(ordered)
    facts["dispatch"] = dispatched.summary(arch.name, ordered, facts.get("providers", {}))
    return parent.record(options, gated.judge(ordered, broken=interrupted), facts, interrupted)


def _run_due(
    pool: isolate.Pool[parent.Group],
    due: Sequence[PlanLine],
    results: dict[journal.Key, Result],
    facts: Mapping[str, Any],
    options: RunOptions,
) -> None:
    from m3check import __version__
    from m3check.config import Event

    fingerprint = {
        "m3check": __version__,
        "arch": options.arch,
        "evidence": facts["evidence"],
        "providers": facts["providers"],
        "torch": facts["torch"],
        "triton": facts["triton"],
        **({"sanitize": options.sanitize} if options.sanitize else {}),
    }
    for name in FILES.values():  # where this run is killed, an earlier one's report must not stand for it
        (options.folder / name).unlink(missing_ok=True)
    book = journal.Journal(options.folder / "journal.jsonl", fingerprint, options.resume)
    try:
        tasks: dict[parent.Group, list[PlanLine]] = {}
        done = 0
        for line in sorted(due, key=lambda line: -_cases.cost(_cases.parse_id(line.case), line.evidence)):
            earlier = book.earlier.get(_key(line))
            if earlier is not None:
                results[_key(line)] = earlier
                done += 1
            else:
                tasks.setdefault(parent.Group(line.provider, line.evidence), []).append(line)

        def message(line: PlanLine) -> dict[str, Any]:
            import msgspec

            return {"line": msgspec.to_builtins(line), "repro": runner.repro(line, options)}

        for line, answer in pool.run(tasks, message):
            if isinstance(answer, isolate.Death):
                result = parent.without_running(line, Status(answer.kind), answer.reason, options)
            else:
                import msgspec

                result = msgspec.convert(answer, Result)
            results[_key(line)] = result
            book.append(result)
            done += 1
            if options.progress is not None:
                options.progress(Event(done, len(due), result))
    finally:
        book.close()
