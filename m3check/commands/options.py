"""Command-line words → RunOptions, for every command that plans."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from m3check.config import Event, RunOptions

_NAMES = {  # argparse's destination: RunOptions' field; what was not said keeps the field's default
    "arch": "arch",
    "kernels": "kernels",
    "op": "ops",
    "tier": "tier",
    "k": "expr",
    "case": "cases",
    "shard": "shard",
    "seed": "seed",
    "require": "require",
    "offline": "offline",
    "jobs": "jobs",
    "timeout": "timeout",
    "resume": "resume",
    "strict": "strict",
    "sanitize": "sanitize",
    "save_failures": "save_failures",
    "out": "out",
}


def options(arguments: argparse.Namespace, progress: Callable[[Event], None] | None = None) -> RunOptions:
    """The options of one command line; raises M3CheckError for a value that cannot be meant."""
    said: dict[str, Any] = {}
    for word, field in _NAMES.items():
        value = getattr(arguments, word, None)
        if value is not None:
            said[field] = tuple(dict.fromkeys(value)) if isinstance(value, list) else value
    if "out" in said:
        said["out"] = Path(said["out"])
    return RunOptions(**said, progress=progress)
