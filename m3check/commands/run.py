"""`m3check run`: run, tell, and leave a valid report whatever happens."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shlex
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from m3check.commands import github
from m3check.commands.options import options as options_of
from m3check.commands.progress import Progress
from m3check.commands.talk import drop_stdout, emit, talk
from m3check.config import Event, RunOptions
from m3check.gate import Gate
from m3check.types import RED, Exit, M3CheckError, Record, Result, Status


def main(arguments: argparse.Namespace) -> int:
    """Run, write the reports, print the summary; the last line on stderr says code, reason and where the report is."""
    options = options_of(arguments)
    if sys.platform != "linux":
        raise M3CheckError(f"kernels run on Linux only, this is {sys.platform}; list, show and compare work here")
    from m3check.report.files import check_writable

    gate = Gate(options)
    progress = Progress(sys.stderr, options.strict)
    options = replace(options, progress=lambda event: progress(_covered(event, gate)))
    check_writable(options.folder)
    if options.save_failures:
        from m3check.explain import saving

        saving.check()
    try:
        with signals(signal.SIGTERM, interrupt):  # what ends a job in CI must leave a report as ctrl-C does
            record = _run(options, progress)
    except Exception:
        with suppress(OSError):
            options.folder.rmdir()  # only where it is empty: a mistyped case leaves nothing behind
        raise
    finally:
        progress.close()

    def save(record: Record) -> None:
        if options.save_failures:
            for folder in saving.save(record, options, talk):
                talk(f"m3check: saved {folder}: python {folder}/repro.py")

    return finish(record, options.folder, save)


def finish(record: Record, folder: Path, then: Callable[[Record], None] = lambda record: None) -> int:
    """Write the reports and print the summary; the last line says code, reason and where the report is."""
    with signals(signal.SIGINT, signal.SIG_IGN):  # a second ctrl-C must not cut the report off
        record, report = _write(record, folder)
    _print(record)
    then(record)
    github.tell(record)
    if number := _first(record):
        talk(f"m3check: what it looks like: m3check explain {shlex.quote(str(folder))}#{number}")
    talk(f"m3check: exit {record.exit.code}: {record.exit.reason}; report: {report}")
    return record.exit.code


def _first(record: Record) -> int:
    """The number that `m3check explain` knows the first red result by that has an answer to look at, or 0."""
    red = [result for result in record.results if result.status in RED]
    return next((i for i, r in enumerate(red, 1) if r.status is Status.FAILED and r.evidence != "compiled"), 0)


def _covered(event: Event, gate: Gate) -> Event:
    """An event whose result is told as the ledger has it."""
    return event if event.result is None else replace(event, result=gate.cover(event.result))


def _run(options: RunOptions, progress: Progress) -> Record:
    """The run's record; where the run broke off, a record of what had come by then."""
    try:
        from m3check import api

        return api.run(options)
    except ImportError:
        raise  # main() says what is missing; nothing has run
    except M3CheckError as error:
        if not progress.results:
            raise
        return _broken(options, progress.results, Exit(4, str(error)))
    except KeyboardInterrupt:
        return _broken(options, progress.results, Exit(2, f"interrupted after {len(progress.results)} results"))
    except OSError as error:
        if error.errno is None:
            raise
        talk(f"m3check: {_os(error)}; {len(progress.results)} results are kept in the report")
        return _broken(options, progress.results, Exit(3, f"broken off: {_os(error)}"))
    except Exception as error:
        import traceback

        traceback.print_exception(error)
        return _broken(options, progress.results, Exit(3, f"internal error: {type(error).__name__}: {error}"))


def _broken(options: RunOptions, results: list[Result], exit: Exit) -> Record:
    from m3check import __version__
    from m3check.report.jsonfile import SCHEMA_VERSION
    from m3check.report.tally import summarise

    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Record(
        schema_version=SCHEMA_VERSION,
        tool={"name": "m3check", "version": __version__},
        arch=options.arch,
        environment={
            "date": now,
            "host": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        },
        command=options.command,
        exit=exit,
        summary=summarise(results),
        results=tuple(results),
    )


def _write(record: Record, folder: Path) -> tuple[Record, str]:
    """Write the reports; where the folder no longer takes them, into a temporary one; where nothing does, to stdout."""
    from m3check import report

    try:
        report.write(record, folder)
        return record, str(folder / report.FILES["md"])
    except OSError as error:
        talk(f"m3check: the reports cannot be written to {folder}: {_os(error)}")
        reason = f"{record.exit.reason}; but the reports could not be written to {folder}: {_os(error)}"
        record = replace(record, exit=Exit(2 if record.exit.code == 2 else 3, reason))
    with suppress(OSError):
        elsewhere = Path(tempfile.mkdtemp(prefix="m3check-"))
        report.write(record, elsewhere)
        return record, str(elsewhere / report.FILES["md"])
    emit(report.render([record], "json"))
    return record, "on stdout, as JSON"


def _print(record: Record) -> None:
    from m3check.report import markdown

    try:
        told = (markdown.head(record), markdown.gate(record), markdown.summary(record, short=True))
        emit("\n\n".join(filter(None, told)))
    except OSError as error:  # the report has it all: what becomes of its summary changes no exit code
        drop_stdout()
        talk(f"m3check: the summary cannot be written to stdout: {_os(error)}")


def _os(error: OSError) -> str:
    place = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror or error}{place}"


@contextmanager
def signals(number: signal.Signals, handler: Any) -> Iterator[None]:
    """Another handler of one signal, for a while."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may have handlers
        return
    previous = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, previous)


def interrupt(*_: object) -> NoReturn:
    """End as ctrl-C does."""
    raise KeyboardInterrupt
