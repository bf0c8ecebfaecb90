"""One worker for the author's bench: questions one after the other, a fresh worker when a kernel crashes or hangs."""

from __future__ import annotations

import selectors
from collections.abc import Callable
from typing import Any

from m3check import arch as arches
from m3check import isolate, kernels, parent, runner
from m3check.config import RunOptions
from m3check.types import M3CheckError, PlanLine


def default_arch() -> str:
    """The target whose GPU is here, else sm90, interpreted."""
    found = [name for _, name in arches.present() if name in arches.ARCHS]
    return found[0] if found else "sm90"


class Helper:
    """A worker bound to one provider on one target; use it as a context."""

    def __init__(self, arch: str, spec: str, offline: bool, timeout: float, warn: Callable[[str], None]) -> None:
        target = arches.find_arch(arch)
        self.evidence, device, self.why = runner.evidence_for(target)
        parsed = kernels.parse_spec(spec)
        for warning in kernels.prepare(parsed, offline):
            warn(f"m3check: {spec}: {warning}")
        self.arch, self.spec, self.timeout = target.name, spec, timeout
        self._command = parent.worker_command(spec, target.name, self.evidence, device, offline)
        self._worker: isolate.Worker | None = None

    def __enter__(self) -> Helper:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def hello(self) -> dict[str, Any]:
        """What the worker said of itself when it had loaded the provider; raises M3CheckError where it could not."""
        hello = self._started().hello
        assert hello is not None
        return hello

    def line(self, case: str) -> PlanLine:
        """The plan of one case here; raises M3CheckError where it would be skipped."""
        planned = runner.plan(RunOptions(arch=self.arch, kernels=(self.spec,), cases=(case,)))
        line = next(line for line in planned if line.evidence == self.evidence)
        if line.skip is not None:
            raise M3CheckError(f"{case} is not for {self.spec} on {self.arch}: {line.skip}")
        return line

    def ask(self, message: dict[str, Any], limit: float = 0.0) -> dict[str, Any] | isolate.Death:
        """The worker's answer, or how it died; raises M3CheckError where the worker or the case is refused."""
        worker = self._started()
        worker.start(message, message, limit or self.timeout)
        reply = self._next(worker, "answer")
        worker.task = None
        if isinstance(reply, isolate.Death):
            self.end()
            return reply
        if reply.get("spent"):  # its GPU context is lost
            self.end()
        answer: dict[str, Any] = reply["answer"]
        if "refused" in answer:
            raise M3CheckError(answer["refused"])
        return answer

    def _started(self) -> isolate.Worker:
        if self._worker is None:
            self._worker = isolate.Worker(self._command, parent.worker_environment(self.evidence))
            reply = self._next(self._worker, "hello")
            if isinstance(reply, isolate.Death):
                self.end()
                raise M3CheckError(f"{self.spec} could not be loaded: {reply.reason}")
            if "refused" in reply["hello"]:
                self.end()
                raise M3CheckError(reply["hello"]["refused"])
            self._worker.hello = reply["hello"]
        return self._worker

    def _next(self, worker: isolate.Worker, what: str) -> dict[str, Any] | isolate.Death:
        with selectors.DefaultSelector() as selector:
            selector.register(worker, selectors.EVENT_READ)
            while True:
                if selector.select(timeout=0.5):
                    messages = worker.receive()
                    if messages is None:
                        return isolate.Death("crashed", worker.death())
                    for message in messages:
                        if what in message:
                            return message
                elif worker.overdue():
                    return isolate.Death("timeout", "no answer in time; the worker was ended")

    def end(self) -> None:
        """End the worker; the next question starts a fresh one."""
        if self._worker is not None:
            self._worker.kill()
            self._worker = None
