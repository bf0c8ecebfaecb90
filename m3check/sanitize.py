"""`--sanitize`: workers under NVIDIA's compute-sanitizer, and what it printed as findings.

Its report is text, a block for each error: what and how wide the access was, the kernel with its source line, the thread,
and how far the address is from the nearest allocation. Torch's allocator keeps blocks of many tensors, in which a stray
access is valid, so a sanitized worker gives every tensor an allocation of its own. Allocations stand side by side, so that
the first element past one is often the first of the next: memcheck is told to leave room between them. Graphs cannot be
captured then: a sanitized run makes the first call of each case and no invariant.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from m3check import isolate
from m3check.types import RED, Finding, M3CheckError, Result, Status

ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

ROOM = {"memcheck": ["--padding", str(1 << 20)]}
"""Words for each tool that has such an option: bytes after every allocation that belong to nobody."""

SLOWER = 20.0
"""A case may take this many times its time limit."""

SHOWN = 8
"""Errors of one case that become findings of their own."""

PLACES = ("/usr/local/cuda/bin", "/opt/cuda/bin")

_HEAD = "========= "


def program() -> str:
    """Where compute-sanitizer is; raises M3CheckError where it is not."""
    homes = [os.path.join(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    found = shutil.which("compute-sanitizer")
    for folder in (*homes, *PLACES):
        found = found or shutil.which("compute-sanitizer", path=folder)
    if found is None:
        raise M3CheckError(
            "--sanitize needs compute-sanitizer, which is neither on PATH nor in CUDA_HOME/bin nor in /usr/local/cuda/bin; "
            "it comes with the CUDA toolkit"
        )
    return found


def needed(evidence: str, why: str) -> str:
    """The program, for a run of this evidence; raises M3CheckError where there is nothing to sanitize."""
    if evidence != "device":
        raise M3CheckError(
            f"--sanitize watches launches on a GPU, and here {why}; an interpreted run watches every address already "
            "(check `memory`): leave --sanitize out"
        )
    return program()


class Workers:
    """Makes sanitized workers, each with a report of its own."""

    def __init__(self, tool: str, evidence: str, why: str) -> None:
        self._program, self._tool = needed(evidence, why), tool
        self._folder = tempfile.TemporaryDirectory(prefix="m3check-sanitizer-")
        self._made = 0

    def make(self, command: dict[str, Any], environment: dict[str, str]) -> isolate.Worker:
        """A worker that runs under the tool."""
        self._made += 1
        log = os.path.join(self._folder.name, f"{self._made}.txt")
        words = [self._program, "--tool", self._tool, *ROOM.get(self._tool, ()), "--target-processes", "all",
                 "--show-backtrace", "no", "--report-api-errors", "no", "--print-limit", "100",
                 "--log-file", log]  # fmt: skip
        return _Worker({**command, "sanitizer": [log, self._tool]}, {**environment, **ENVIRONMENT}, words)


class _Worker(isolate.Worker):
    """A worker under the tool. Where a GPU is lost torch ends the process as it frees memory: the report tells why."""

    def __post_init__(self) -> None:
        self._log = Log(*self.command["sanitizer"])
        super().__post_init__()

    def start(self, task: Any, message: dict[str, Any], limit: float) -> None:
        self._log.news(0)  # of the tasks before
        super().start(task, message, limit)

    def death(self) -> str:
        seen = [finding for finding in self._log.news() if finding.status is Status.FAILED]
        return "; ".join([*(_told(finding) for finding in seen[:1]), super().death()])


def joined(result: Result, found: Sequence[Finding]) -> Result:
    """A result with the sanitizer's findings: what it saw is the cause, whatever else went wrong after it."""
    result = replace(result, findings=(*result.findings, *found))
    worst = next((f for f in found if f.status is not Status.PASSED), None)
    if worst is None:
        return result
    reason = _told(worst)
    if result.status in RED:
        return replace(result, reason=f"{reason}; {result.reason}")
    return replace(result, status=worst.status, reason=reason)


def _told(finding: Finding) -> str:
    return f"sanitizer: {finding.hint}" + (f" at {finding.where}" if finding.where else "")


class Log:
    """What compute-sanitizer has written for one worker, case by case."""

    def __init__(self, path: str, tool: str) -> None:
        self._path, self._tool = Path(path), tool
        self._read = 0

    def news(self, wait: float = 0.2) -> list[Finding]:
        """Findings of what was written since the last time; waits so long for text that is still on its way."""
        text = self._new()
        until = time.monotonic() + wait
        while time.monotonic() < until and not text.endswith("\n"):
            time.sleep(0.02)
            text += self._new()
        if not self._read:
            return [Finding("sanitizer", Status.ERROR, hint="compute-sanitizer wrote no report: nothing was watched")]
        return findings(text, self._tool)

    def _new(self) -> str:
        if not self._path.exists():
            return ""
        with self._path.open("rb") as file:
            file.seek(self._read)
            data = file.read()
        self._read += len(data)
        return data.decode(errors="replace")


def findings(text: str, tool: str) -> list[Finding]:
    """A finding for each error of a report (the first SHOWN of different places), or one that there was none."""
    errors = [block for block in blocks(text) if _is_error(block[0])]
    found: dict[tuple[str, str], Finding] = {}
    for block in errors:
        finding = _finding(block)
        found.setdefault((finding.where.partition(",")[0], finding.hint.partition(";")[0]), finding)
    if not errors:
        return [Finding("sanitizer", Status.PASSED, 0.0, 0.0, hint=tool)]
    first, *others = list(found.values())[:SHOWN]
    count = f"; {len(errors)} errors in {len(found)} places" if len(errors) > 1 else ""
    return [Finding(first.check, first.status, float(len(errors)), 0.0, first.where, first.hint + count), *others]


def blocks(text: str) -> list[list[str]]:
    """The paragraphs of a report: a line that is not indented, and the indented ones below it."""
    made: list[list[str]] = []
    for line in text.splitlines():
        if not line.startswith(_HEAD.rstrip()):
            continue
        body = line.removeprefix(_HEAD.rstrip())
        if not body.strip():
            continue
        if body.startswith("     ") and made:
            made[-1].append(body.strip())
        else:
            made.append([body.strip()])
    return made


_NOT_ERRORS = re.compile(
    r"COMPUTE-SANITIZER|ERROR SUMMARY|RACECHECK SUMMARY|LEAK SUMMARY|Program hit|Target application|Saved host|Host Frame|"
    r"Warning: Detected overlap|Process didn't terminate"
)
_KERNEL = re.compile(r"at (?:void )?(?P<kernel>[^\s+(]+)(?:.*? in (?P<file>\S+:\d+))?")
_ITSELF = re.compile(r"Error: (?!.*(Race|hazard))|Internal")


def _is_error(line: str) -> bool:
    return not _NOT_ERRORS.match(line)


def _finding(block: Sequence[str]) -> Finding:
    """One error: where = kernel, source line, thread and block; hint = the access and its distance."""
    what, *rest = block
    if _ITSELF.match(what):
        return Finding("sanitizer", Status.ERROR, hint=f"compute-sanitizer itself: {what.removeprefix('Error: ')}")
    kernel, address = "", []
    thread = ""
    for line in rest:
        if line.startswith("at ") and not kernel:
            kernel = _place(line)
        elif line.startswith("by thread"):
            thread = line.removeprefix("by ")
        elif line.startswith(("Address", "and is", "and Read", "and Write", "and Atomic")):
            address.append(line)
    if " at " in what and not kernel:  # a hazard: "Race reported between Write access at KERNEL in FILE"
        what, _, place = what.partition(" at ")
        kernel = _place(f"at {place}")
    where = ", ".join(part for part in (kernel, thread) if part)
    hint = "; ".join([what.removeprefix("Error: "), *address]).replace("; and ", " and ")
    return Finding("sanitizer", Status.FAILED, 1.0, 0.0, where, hint)


def _place(line: str) -> str:
    match = _KERNEL.match(line)
    if match is None:
        return line.removeprefix("at ")
    return match["kernel"] + (f" at {Path(match['file']).name}" if match["file"] else "")
