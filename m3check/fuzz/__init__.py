"""`m3check fuzz`: cases that nobody wrote down, drawn from all that make sense, until the time is up.

Providers take turns; the ops of one are searched side by side, a round of each after the other, by as many threads as there
are jobs. Each thread asks a worker process of its own, which costs an example where it crashes or hangs, not the search.
"""

from __future__ import annotations

import importlib.util
import re
import secrets
import threading
import time
from collections import deque
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from m3check import arch as arches
from m3check import cases, gate, isolate, kernels, parent, runner
from m3check.config import Event
from m3check.explain.process import Helper
from m3check.report import FILES
from m3check.types import OPS, Case, M3CheckError, PlanLine, Record, Result, Status

if TYPE_CHECKING:
    from m3check.config import RunOptions
    from m3check.fuzz.search import Example, Search

MINUTES = 10.0
ROUND = 12
"""Examples of one op before the next has its turn: half a minute, interpreted on a busy machine."""

GRACE = 30.0
"""Seconds past the end that a failure found last may still take to become small."""

FEW = 50
"""Examples of each op and provider that `--ci` tries."""

KEPT = 2000
"""Results in a record; what passed beyond them is only counted."""

FOLDER = "examples"


@dataclass(frozen=True)
class Budget:
    """How long to search, and whether everybody who searches so tries the same cases."""

    seconds: float = 0.0
    """0: no limit, but that of `examples`."""
    examples: int = 0
    """Of each op and provider; 0: no limit, but that of `seconds`."""
    seed: int | None = None
    """With a seed the cases depend on nothing else: no example of an earlier run is tried again, and none is kept."""


def check() -> None:
    """Raise M3CheckError where nothing can be searched, before anything has run."""
    if importlib.util.find_spec("hypothesis") is None:
        raise M3CheckError("m3check fuzz needs hypothesis, which is not installed: pip install 'm3check[fuzz]'")


class _Stopped(BaseException):
    """Ends a thread in the middle of a round; hypothesis takes an Exception for a failing example."""


class Fuzz:
    """One run of `m3check fuzz`; `results` and `facts` are good at any time, also after a break."""

    def __init__(self, options: RunOptions, budget: Budget) -> None:
        self.options, self.budget = options, budget
        self.seed = secrets.randbelow(2**32) if budget.seed is None else budget.seed
        self.arch = arches.find_arch(options.arch)
        self.evidence, _, why = runner.evidence_for(self.arch)
        self.jobs = options.jobs or parent.default_jobs(self.evidence)
        self.facts = parent.circumstances(self.evidence, why, self.jobs)
        self.searches: dict[tuple[str, str], Search] = {}
        self._gate = gate.Gate(options)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._helpers: list[Helper] = []
        self._done = 0
        self._deadline = 0.0

    @property
    def results(self) -> tuple[Result, ...]:
        """The failures, each on the smallest case that was found, and what else ran, as far as it is kept."""
        most = KEPT // max(1, len(self.searches))
        return tuple(result for search in self.searches.values() for result in search.results(most))

    def run(self) -> None:
        """Search until time or examples are used up. Raises M3CheckError for what the user can mend."""
        started = time.monotonic()
        for text in self.options.kernels:
            for warning in kernels.prepare(kernels.parse_spec(text), self.options.offline):
                self._tell(Event(0, 0, message=f"m3check: {text}: {warning}"))
        for name in FILES.values():  # where this run is killed, an earlier one's report must not stand for it
            (self.options.folder / name).unlink(missing_ok=True)
        try:
            with ExitStack() as stack:
                first = {text: stack.enter_context(self._helper(text)) for text in dict.fromkeys(self.options.kernels)}
                hellos = {parent.Group(text, self.evidence): helper.hello() for text, helper in first.items()}
                self.facts |= parent.introduced(hellos)
                begun = time.monotonic()
                for n, (text, helper) in enumerate(first.items(), 1):
                    share = self.budget.seconds * n / len(first)
                    self._deadline = begun + share if share else float("inf")
                    self._provider(text, helper)
        finally:
            self.facts["seconds"] = round(time.monotonic() - started, 1)
            self.facts["fuzz"] = {
                "seed": self.seed,
                "seconds": self.budget.seconds,
                "examples": self.budget.examples,
                "ran": sum(search.ran for search in self.searches.values()),
            }

    def record(self, command: str, interrupted: bool) -> Record:
        """What came of it, as a run's record."""
        return parent.record(self.options, gate.Judgement(self.results), self.facts, interrupted, command)

    def _provider(self, text: str, helper: Helper) -> None:
        """Search all ops of one provider."""
        from m3check.fuzz.search import Search

        spec = kernels.parse_spec(text)
        # Without the version: what failed in one is tried on the next.
        place = re.sub(r"[^A-Za-z0-9]+", "-", text.partition("==")[0]).strip("-")
        queue: deque[Search] = deque()

        def refuses(case: Case) -> str | None:
            return kernels.refuses(spec, case, self.arch, self.evidence)

        for op in self.options.ops or OPS:
            if all(refuses(case) is not None for case in cases.tier("full") if case.op == op):
                continue  # a refusal that is known beforehand need not be found out by trying
            search = Search(
                op,
                self.evidence,
                self.seed,
                refuses=refuses,
                folder=self.options.folder / FOLDER / place / op if self.budget.seed is None else None,
                enough=self._enough,
                strict=self.options.strict,
            )
            self.searches[text, op] = search
            queue.append(search)
        lanes = min(self.jobs, len(queue))
        if not lanes:
            return
        with ThreadPoolExecutor(lanes) as pool:
            due: set[Future[None]] = {pool.submit(self._lane, text, queue, helper if not n else None) for n in range(lanes)}
            try:
                while due:
                    done, due = wait(due, timeout=0.2, return_when=FIRST_EXCEPTION)
                    for future in done:
                        future.result()
            except BaseException:
                self._stop.set()
                for each in self._helpers:
                    each.end()
                raise

    def _lane(self, text: str, queue: deque[Search], helper: Helper | None) -> None:
        """Round after round, of one op after the other."""
        with helper or self._helper(text) as mine:
            while True:
                try:
                    search = queue.popleft()
                except IndexError:
                    return
                before, most = search.ran, self.budget.examples
                count = min(ROUND, most - before) if most else ROUND
                for result in search.round(count, lambda example: self._attempt(text, mine, example)):
                    self._tell(Event(self._done, 0, result))
                if search.ran > before and (not most or search.ran < most) and not self._enough(False):
                    queue.append(search)

    def _helper(self, text: str) -> Helper:
        helper = Helper(self.options.arch, text, self.options.offline, self.options.timeout, lambda warning: None)
        self._helpers.append(helper)
        return helper

    def _enough(self, shrinking: bool) -> bool:
        return self._stop.is_set() or time.monotonic() > self._deadline + (GRACE if shrinking else 0.0)

    def _attempt(self, text: str, helper: Helper, example: Example) -> Result:
        """One example in a worker."""
        import msgspec

        name = cases.case_id(example.case)
        shown = (example.invariant,) if example.invariant else ()
        line = PlanLine(name, example.case.op, text, self.evidence, None, shown)
        try:
            answer = helper.ask({"line": msgspec.to_builtins(line), "repro": runner.repro(line, self.options)})
        finally:
            if self._stop.is_set():  # whatever its worker says: it was ended
                raise _Stopped
        if isinstance(answer, isolate.Death):
            result = parent.without_running(line, Status(answer.kind), answer.reason, self.options)
        else:
            result = msgspec.convert(answer, Result)
        self._done += 1
        self._tell(Event(self._done, 0, running=name))
        return self._gate.cover(result)

    def _tell(self, event: Event) -> None:
        if self.options.progress is not None and not self._stop.is_set():
            with self._lock:
                self.options.progress(event)
