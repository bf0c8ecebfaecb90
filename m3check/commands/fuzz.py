"""`m3check fuzz`: search for failing cases that nobody wrote down; reports and exit codes are those of a run."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from m3check.commands.options import options as options_of
from m3check.commands.progress import Progress
from m3check.commands.run import finish, interrupt, signals
from m3check.types import M3CheckError

if TYPE_CHECKING:
    from m3check import fuzz

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def main(arguments: argparse.Namespace) -> int:
    """Search, print each failure's smallest case with its command, write the reports."""
    from m3check import fuzz

    fuzz.check()
    import platformdirs

    from m3check.explain.process import default_arch
    from m3check.report.files import check_writable
    from m3check.settings import load

    if arguments.arch is None and load(None)["arch"].origin == "default":
        arguments.arch = default_arch()
    budget = _budget(arguments)
    progress = Progress(sys.stderr, bool(arguments.strict))
    options = replace(options_of(arguments), progress=progress)
    if options.out is None:
        options = replace(options, out=Path("reports") / f"fuzz-{options.arch}")
    check_writable(options.folder)
    # hypothesis keeps what it reads out of sources somewhere: not where the user happens to stand.
    os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(platformdirs.user_cache_path("m3check") / "hypothesis"))
    search = fuzz.Fuzz(options, budget)
    interrupted = False
    try:
        with signals(signal.SIGTERM, interrupt):
            search.run()
    except KeyboardInterrupt:
        interrupted = True
    finally:
        progress.close()
    return finish(search.record(shlex.join(["m3check", *sys.argv[1:]]), interrupted), options.folder)


def _budget(arguments: argparse.Namespace) -> fuzz.Budget:
    from m3check import fuzz

    if arguments.ci and arguments.seed is not None:
        raise M3CheckError("--ci has a seed of its own, 0; leave --ci or --seed out")
    seed = 0 if arguments.ci else arguments.seed
    examples = arguments.max_examples if arguments.max_examples is not None else fuzz.FEW if arguments.ci else 0
    if arguments.max_examples is not None and examples < 1:
        raise M3CheckError(f"--max-examples {examples} leaves nothing to try; the least is 1")
    seconds = _duration(arguments.time) if arguments.time else 0.0 if examples else 60 * fuzz.MINUTES
    return fuzz.Budget(seconds, examples, seed)


def _duration(text: str) -> float:
    """Seconds of `90s`, `10m`, `1.5h`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if match is None or not float(match[1]):
        raise M3CheckError(f"--time wants a length such as 90s, 10m or 2h, got {text!r}")
    return float(match[1]) * _SECONDS[match[2]]
