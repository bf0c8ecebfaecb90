"""Workers that answer at once with a verdict that a test chose: everything else of a run is real."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from records import finding

from m3check import cases, isolate, runner
from m3check.config import RunOptions
from m3check.types import PlanLine, Result, Status

Verdict = Callable[[PlanLine], Status | BaseException]


def result_of(line: PlanLine, status: Status, repro: str = "") -> Result:
    findings = (finding("ids", Status.FAILED, measured=2.0),) if status is Status.FAILED else (finding("ids"),)
    axes = cases.parse_id(line.case).axes()
    reason = "" if status is Status.PASSED else f"it {status}"
    return Result(line.case, line.op, line.provider, line.op, line.evidence, axes, status, reason, findings, 0.01, repro)


def install(monkeypatch: pytest.MonkeyPatch, verdict: Verdict, compiled: bool = False, **description: str) -> list[str]:
    """Put such workers in place; returns the ids of the cases that they were given, as they come.

    Runs are planned without what they cross-compile beside, unless `compiled`: one result for each case is easier to count.
    """
    ran: list[str] = []

    class Pool:
        def __init__(self, *_: Any) -> None: ...

        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *_: Any) -> None: ...

        def greet(self, groups: list[Any]) -> dict[Any, dict[str, Any]]:
            machine = {"torch": "2.13.0", "triton": "3.8.0"}
            hello = {"warnings": [], "environment": machine, "repairs": [], "description": description}
            return dict.fromkeys(groups, hello)

        def run(self, tasks: dict[Any, list[PlanLine]], message: Callable[[Any], Any]) -> Iterator[tuple[PlanLine, Any]]:
            for line in (line for queue in tasks.values() for line in queue):
                told = verdict(line)
                if isinstance(told, BaseException):
                    raise told
                ran.append(line.case)
                yield line, msgspec.to_builtins(result_of(line, told, message(line)["repro"]))

    planned = runner.plan if not hasattr(runner.plan, "whole") else runner.plan.whole

    def plan(options: RunOptions) -> list[PlanLine]:
        return [line for line in planned(options) if compiled or line.evidence != "compiled"]

    plan.whole = planned  # type: ignore[attr-defined]
    monkeypatch.setattr(runner, "plan", plan)
    monkeypatch.setattr(isolate, "Pool", Pool)
    return ran
