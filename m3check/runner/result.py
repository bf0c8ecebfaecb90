"""run_one(): one case on one kernel, from its inputs to its result."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from m3check import power, rerun
from m3check.compiled import evidence as compiled
from m3check.runner.calling import KernelRaised, Session, first_call, inputs_for, sentence, setting_of
from m3check.runner.judging import Judge, red, verdict
from m3check.types import Case, Finding, Heat, Inputs, Kernel, M3CheckError, PlanLine, Result, Status, Sums

if TYPE_CHECKING:
    from m3check.paging import Run

Moved = TypeVar("Moved", Inputs, "Run")


def run_one(case: Case, session: Session, line: PlanLine, command: str) -> Result:
    """Make the inputs, run the kernel, judge its outputs. Never raises for what a kernel does."""
    started = time.perf_counter()
    kernel: Kernel | None = session.loaded.kernel(case.op, case)
    name = kernel.name if kernel else case.op

    def result(status: Status, reason: str = "", findings: Sequence[Finding] = ()) -> Result:
        return Result(
            line.case,
            case.op,
            line.provider,
            name,
            session.evidence,
            case.axes(),
            status,
            reason,
            tuple(findings),
            round(time.perf_counter() - started, 3),
            command,
        )

    if kernel is None:
        return result(Status.SKIPPED, session.loaded.missing.get(case.op, f"{line.provider} has no {case.op}"))
    refusal = session.loaded.refuses(case)
    if refusal is not None:
        return result(Status.SKIPPED, refusal)
    try:
        if session.evidence == "compiled":
            found = compiled.findings(case, kernel, session.arch, bool(line.invariants), session.compiling)
            return result(*verdict(found), found)
        findings, sums, heat = _judge(case, kernel, session, line.invariants)
    except compiled.NothingToCompile as error:
        return result(Status.SKIPPED, str(error))
    except KernelRaised as error:
        return result(Status.ERROR, str(error))
    except M3CheckError as error:
        return result(Status.ERROR, str(error))
    except Exception as error:  # a defect of m3check must cost this case alone, and say whose it is
        return result(Status.ERROR, f"m3check itself failed, not the kernel: {sentence(error)}")
    status, reason = verdict(findings)
    if session.unrepaired and status is not Status.SKIPPED:
        return result(Status.INCONCLUSIVE, "; ".join(session.unrepaired), findings)
    if status is Status.PASSED:  # agreed; but would a wrong answer have passed, too?
        status, reason = power.doubt(case, session.device) or (status, reason)
    return replace(result(status, reason, findings), sums=sums, heat=heat)


def _judge(
    case: Case, kernel: Kernel, session: Session, names: Sequence[str]
) -> tuple[list[Finding], Sums | None, Heat | None]:
    inputs = inputs_for(kernel, case, session.judged_on or session.device)
    try:
        run, setting = first_call(kernel, _moved(inputs, session.device) if session.judged_on else inputs, session)
    except KernelRaised as error:
        judged = Judge(inputs, setting_of(kernel, session))
        told = judged(inputs, _moved(error.run, inputs.device.type)) if error.run is not None else []
        raise KernelRaised(f"{error}{_built_wrongly(told)}") from error
    if session.judged_on:
        names, run = (), _moved(run, session.judged_on)
    judge = Judge(inputs, setting)
    findings = judge.named(judge(inputs, run))
    heat = judge.heat() if session.heat and red(findings) else None
    if names and not red(findings):  # a result that is red already needs no further cause
        findings += rerun.findings(names, kernel, session, inputs, run, setting, judge)
    return findings, judge.sums(run) if session.evidence == "device" and not kernel.parts else None, heat


def _built_wrongly(findings: Sequence[Finding]) -> str:
    """Of a layer that raised: what is wrong in the metadata that its kernels were given."""
    return "".join(f"; {f.where} {f.hint}" for f in findings if f.check == "metadata" and f.status is Status.FAILED)


def _moved(value: Moved, device: str) -> Moved:
    """Inputs, or a run, with its tensors on another device; watched memory stays where it is."""
    import torch

    def there(held: Any) -> Any:
        if isinstance(held, dict):
            return {name: there(each) for name, each in held.items()}
        return held.to(device) if isinstance(held, torch.Tensor) else held

    return replace(value, **{name: there(held) for name, held in vars(value).items()})
