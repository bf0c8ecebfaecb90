"""Worker processes: one provider and one kind of evidence for life, a time limit for each case, and no shared fate.

Parent and worker speak JSON lines over a socket of their own, so that what a kernel prints does no harm. A worker that dies
or hangs costs one case; the run goes on with a fresh one.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

Group = TypeVar("Group", bound=Hashable)
"""What a worker serves for life."""

COMPILE_LIMIT = 600.0
"""Seconds that the compilations of one case may take; they do not count against its time limit."""

START_LIMIT = 300.0
"""Seconds until a new worker has loaded its provider."""

SLOW_START = 30.0
"""Seconds after which a worker that still loads is told of."""

STDERR_TAIL = 4000

STDLIB = sysconfig.get_path("stdlib")

WHERE = signal.SIGUSR1
"""On which a worker writes to its stderr where it stands, innermost frame first."""


@dataclass
class Death:
    """How a worker ended before it answered."""

    kind: str  # crashed or timeout
    reason: str


@dataclass
class Worker:
    """The parent's end of one worker process."""

    command: dict[str, Any]  # what `serve` needs to load: spec, arch, evidence, …
    environment: dict[str, str]
    wrapper: Sequence[str] = ()
    """Words in front of the worker's command line: a program that runs it, and need pass on no more than its stdin."""
    task: Any = None
    hello: dict[str, Any] | None = None
    _process: subprocess.Popen[bytes] = field(init=False)
    _socket: socket.socket = field(init=False)
    _buffer: bytes = b""
    _deadline: float = 0.0
    _compiling_since: float | None = None
    _told: bool = False

    def __post_init__(self) -> None:
        ours, theirs = socket.socketpair()
        self._socket = ours
        self._errors = _temporary()
        with theirs:
            number = 0 if self.wrapper else theirs.fileno()
            self._process = subprocess.Popen(
                [*self.wrapper, sys.executable, "-m", "m3check.worker", str(number)],
                pass_fds=[] if self.wrapper else [number],
                env={**os.environ, **self.environment},
                stdin=theirs.fileno() if self.wrapper else subprocess.DEVNULL,
                stdout=self._errors,
                stderr=self._errors,
                start_new_session=True,  # ctrl-C reaches the parent alone; it ends its workers itself
            )
        self._send(self.command)
        self._deadline = time.monotonic() + START_LIMIT

    def fileno(self) -> int:
        """For selectors."""
        return self._socket.fileno()

    def start(self, task: Any, message: dict[str, Any], limit: float) -> None:
        """Hand over one task; its answer comes through `receive`."""
        self.task = task
        self._deadline = time.monotonic() + limit
        self._compiling_since = None
        self._send(message)

    def receive(self) -> list[dict[str, Any]] | None:
        """Messages that have arrived, or None when the worker is gone."""
        try:
            chunk = self._socket.recv(1 << 20)
        except OSError:
            chunk = b""
        if not chunk:
            return None
        *lines, self._buffer = (self._buffer + chunk).split(b"\n")
        messages = []
        for line in lines:
            message = json.loads(line)
            if "compiling" in message:
                self._compile(message["compiling"])
            else:
                messages.append(message)
        return messages

    def _compile(self, began: bool) -> None:
        now = time.monotonic()
        if began and self._compiling_since is None:
            self._compiling_since = now
        elif not began and self._compiling_since is not None:
            self._deadline += now - self._compiling_since
            self._compiling_since = None

    def overdue(self) -> bool:
        """Whether its time is up; compilation stops the clock, up to COMPILE_LIMIT."""
        if self.task is None and self.hello is not None:
            return False
        slack = COMPILE_LIMIT if self._compiling_since is not None else 0.0
        return time.monotonic() > self._deadline + slack

    def slow(self) -> bool:
        """Whether it has been loading for long; true once."""
        told = self._told or time.monotonic() < self._deadline - START_LIMIT + SLOW_START
        self._told = self._told or not told
        return not told

    def where(self) -> str:
        """A clause that says where a process hangs that is about to be ended: its innermost line outside of libraries."""
        if self.wrapper:
            return ""  # a signal would reach the program that runs it
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(WHERE)
        time.sleep(0.3)  # it writes from its signal handler, at once
        frames = re.findall(r'^  File "(.+)", line (\d+) in (.+)$', self._written(), re.MULTILINE)
        outside = [frame for frame in frames if "-packages" not in frame[0] and not frame[0].startswith(("<", STDLIB))]
        return f"; it was at {Path(outside[0][0]).name}:{outside[0][1]}, in {outside[0][2]}" if outside else ""

    def death(self) -> str:
        """How the process ended, with the end of what it wrote, in one sentence."""
        code = self._process.wait(timeout=10)
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        tail = self.tail()
        return f"the worker process ended with {how}" + (f"; it last wrote: {tail}" if tail else "")

    def tail(self) -> str:
        """The last line of what the worker wrote to its stdout and stderr."""
        lines = self._written().strip().splitlines()
        return lines[-1].strip() if lines else ""

    def _written(self) -> str:
        self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, self._errors.tell() - STDERR_TAIL))
        return str(self._errors.read().decode(errors="replace"))

    def kill(self) -> None:
        """End the worker and whatever it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._socket.close()
        self._errors.close()

    def _send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # a dead worker is noticed by `receive`
            self._socket.sendall(json.dumps(message).encode() + b"\n")


def _temporary() -> Any:
    import tempfile

    return tempfile.TemporaryFile()


def serve(
    channel: socket.socket,
    load: Callable[[dict[str, Any], Callable[[dict[str, Any]], None]], dict[str, Any]],
    answer: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    """The worker's loop: load once, say hello, then answer messages until the parent hangs up."""

    def send(message: dict[str, Any]) -> None:
        channel.sendall(json.dumps(message).encode() + b"\n")

    lines = _lines(channel)
    faulthandler.register(WHERE, all_threads=False)
    send({"hello": load(next(lines), send)})
    for message in lines:
        reply = answer(message)
        send({"spent": reply.pop("spent", False), "answer": reply})


def _lines(channel: socket.socket) -> Iterator[dict[str, Any]]:
    buffer = b""
    while chunk := channel.recv(1 << 16):
        *lines, buffer = (buffer + chunk).split(b"\n")
        yield from (json.loads(line) for line in lines)


class Pool(Generic[Group]):
    """Runs tasks on at most `jobs` workers, each bound to one group (a provider and a kind of evidence) for life."""

    def __init__(self, jobs: int, make: Callable[[Group], Worker], limit: float) -> None:
        self._jobs, self._make, self._limit = jobs, make, limit
        self._workers: list[tuple[Group, Worker]] = []

    def __enter__(self) -> Pool[Group]:
        return self

    def __exit__(self, *_: object) -> None:
        for _group, worker in self._workers:
            worker.kill()
        self._workers.clear()

    def greet(self, groups: list[Group]) -> dict[Group, dict[str, Any]]:
        """Start a worker for each group, a few at a time, and collect their hellos; raises ChildProcessError on a death."""
        hellos: dict[Group, dict[str, Any]] = {}
        waiting = list(groups)
        while len(hellos) < len(groups):
            while waiting and len(self._workers) < self._jobs:
                group = waiting.pop(0)
                self._workers.append((group, self._make(group)))
            for group, worker in self._ready():
                messages = worker.receive() if worker.hello is None else []
                if messages is None:
                    raise ChildProcessError(f"{group} could not be loaded: {worker.death()}")
                for message in messages:
                    worker.hello = hellos[group] = message["hello"]
            for group, worker in self._workers:
                if worker.hello is None and worker.overdue():
                    raise ChildProcessError(f"{group} could not be loaded within {START_LIMIT:g} s{worker.where()}")
                if worker.hello is None and worker.slow():
                    print(f"m3check: loading {group} takes more than {SLOW_START:g} s", file=sys.stderr)
            if waiting and all(worker.hello is not None for _group, worker in self._workers):
                self._retire(self._workers[0])
        return hellos

    def run(self, tasks: dict[Group, list[Any]], message: Callable[[Any], dict[str, Any]]) -> Iterator[tuple[Any, Any]]:
        """Yield (task, answer) as they come; an answer is the worker's message or a Death."""
        queues = {group: list(queue) for group, queue in tasks.items()}
        while True:
            self._assign(queues, message)
            if not self._workers:
                return
            for group, worker in self._ready():
                messages = worker.receive()
                if messages is None:
                    yield from self._bury(group, worker, "crashed", worker.death())
                    continue
                for received in messages:
                    if "hello" in received:
                        worker.hello = received["hello"]
                    elif "answer" in received:
                        task, worker.task = worker.task, None
                        yield task, received["answer"]
                        if received.get("spent"):  # its GPU context is lost; what came after would suffer for it
                            self._retire((group, worker))
            for group, worker in list(self._workers):
                if worker.overdue():
                    reason = f"no result within {self._limit:g} s; the worker was ended{worker.where()}"
                    yield from self._bury(group, worker, "timeout", reason)

    def _bury(self, group: Group, worker: Worker, kind: str, reason: str) -> Iterator[tuple[Any, Death]]:
        self._retire((group, worker))
        if worker.hello is None:
            raise ChildProcessError(f"{group} could not be loaded again: {reason}")
        if worker.task is not None:
            yield worker.task, Death(kind, reason)

    def _retire(self, entry: tuple[Group, Worker]) -> None:
        self._workers.remove(entry)
        entry[1].kill()

    def _assign(self, queues: dict[Group, list[Any]], message: Callable[[Any], dict[str, Any]]) -> None:
        for group, worker in list(self._workers):
            if worker.hello is None or worker.task is not None:
                continue
            if queues.get(group):
                task = queues[group].pop(0)
                worker.start(task, message(task), self._limit)
            else:
                self._retire((group, worker))
        while len(self._workers) < self._jobs:
            serving = {g: sum(1 for group, _ in self._workers if group == g) for g in queues}
            starting = {g: sum(1 for group, w in self._workers if group == g and w.hello is None) for g in queues}
            open_groups = [g for g, queue in queues.items() if len(queue) > starting[g]]
            if not open_groups:
                return
            group = max(open_groups, key=lambda g: len(queues[g]) / (1 + serving[g]))
            self._workers.append((group, self._make(group)))

    def _ready(self) -> list[tuple[Group, Worker]]:
        with selectors.DefaultSelector() as selector:
            for entry in self._workers:
                selector.register(entry[1], selectors.EVENT_READ, entry)
            return [key.data for key, _ in selector.select(timeout=0.5)]
