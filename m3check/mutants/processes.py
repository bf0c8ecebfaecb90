"""Runs tasks in processes forked from this one: each gets a copy of everything that is warm, and can break only itself."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

WALL = 20.0
"""A process may wait (for a busy machine) this many times as long as it may compute."""

PR_SET_PDEATHSIG = 1
"""Of prctl, Linux: the signal that a process gets when its parent has ended."""

Send = Callable[[dict[str, Any]], None]


@dataclass
class Child:
    """One forked process and what it has sent."""

    task: Any
    pid: int
    pipe: int
    deadline: float
    buffer: bytes = b""
    messages: list[dict[str, Any]] = field(default_factory=list)
    ended: str = ""
    """Empty where it ended by itself; `timeout`, or how it died."""


def ask_for_devices() -> None:
    """Have another process find this machine's GPUs, and remember them: what is forked off one that asked can use none."""
    from m3check import arch

    question = "import json; from m3check.arch import present; print(json.dumps(present()))"
    answer = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True, timeout=300, check=False)
    lines = answer.stdout.splitlines()
    found = [(index, name) for index, name in json.loads(lines[-1])] if answer.returncode == 0 and lines else []
    vars(arch)["present"] = lambda: list(found)


def limit(seconds: float) -> None:
    """From now on, the calling process may compute for so long; then it is ended by SIGPROF."""
    signal.setitimer(signal.ITIMER_PROF, seconds)


def run(tasks: Iterator[Any], work: Callable[[Any, Send], None], jobs: int, wall: float) -> Iterator[Child]:
    """Do `work(task, send)` for each task in a process of its own, `jobs` at a time; yield them as they end.

    A process is also ended after `wall` seconds without a message. The next task is asked for only when it can start, so
    that what was learnt from the earlier ones can decide what it is.
    """
    running: list[Child] = []
    more = True
    try:
        while more or running:
            while more and len(running) < jobs:
                try:
                    task = next(tasks)
                except StopIteration:
                    more = False
                    break
                running.append(_fork(task, work, wall, running))
            for child in _finished(running, wall):
                running.remove(child)
                yield child
    finally:
        for child in running:
            os.kill(child.pid, signal.SIGKILL)
            os.waitpid(child.pid, 0)
            os.close(child.pipe)


def _fork(task: Any, work: Callable[[Any, Send], None], wall: float, others: list[Child]) -> Child:
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid:
        os.close(theirs)
        return Child(task, pid, ours, time.monotonic() + wall)
    code = 70
    try:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.close(ours)
        for other in others:
            os.close(other.pipe)
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)

        def send(message: dict[str, Any]) -> None:
            data = json.dumps(message).encode() + b"\n"
            while data:
                data = data[os.write(theirs, data) :]

        work(task, send)
        code = 0
    finally:
        os._exit(code)


def _finished(running: list[Child], wall: float) -> Iterator[Child]:
    ready, _, _ = select.select([child.pipe for child in running], [], [], 0.5)
    for child in list(running):
        if child.pipe in ready:
            chunk = os.read(child.pipe, 1 << 16)
            if chunk:
                *lines, child.buffer = (child.buffer + chunk).split(b"\n")
                child.messages += [json.loads(line) for line in lines]
                child.deadline = time.monotonic() + wall
                continue
        elif time.monotonic() > child.deadline:
            os.kill(child.pid, signal.SIGKILL)
            child.ended = "timeout"
        else:
            continue
        _, status = os.waitpid(child.pid, 0)
        os.close(child.pipe)
        if os.WIFSIGNALED(status) and not child.ended:
            number = os.WTERMSIG(status)
            child.ended = "timeout" if number == signal.SIGPROF else f"signal {signal.Signals(number).name}"
        elif os.WIFEXITED(status) and os.WEXITSTATUS(status):
            child.ended = f"exit code {os.WEXITSTATUS(status)}"
        yield child
