"""stdout is data, stderr is talk."""

from __future__ import annotations

import os
import sys
from contextlib import suppress


def talk(text: str) -> None:
    """One line for the user, on stderr; a closed stderr never breaks a run."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def emit(text: str) -> None:
    """Data on stdout. A reader that went away (`| head`) is no mistake, and must not change an exit code."""
    try:
        sys.stdout.write(text if text.endswith("\n") else text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        drop_stdout()


def drop_stdout() -> None:
    """Point stdout at nothing, so that the interpreter's last flush does not complain about a closed pipe."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    with suppress(OSError, ValueError):
        os.dup2(nothing, sys.stdout.fileno())
    os.close(nothing)
