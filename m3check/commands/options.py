"""Command-line words → RunOptions, for every command that plans."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from m3check.config import Event, RunOptions
from m3check.types import M3CheckError

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
    "ledger": "ledger",
    "floor": "floors",
    "out": "out",
}


def options(
    arguments: argparse.Namespace, progress: Callable[[Event], None] | None = None, settings: bool = True
) -> RunOptions:
    """The options of one command line, over those of the settings file and the environment (unless not `settings`).

    Raises M3CheckError for a value that cannot be meant.
    """
    said: dict[str, Any] = {}
    for word, field in _NAMES.items():
        value = getattr(arguments, word, None)
        if value is not None:
            said[field] = tuple(dict.fromkeys(value)) if isinstance(value, list) else value
    for field in ("out", "ledger"):
        if field in said:
            said[field] = Path(said[field])
    below, told = _below(said) if settings else ({}, "")
    if "floors" in below and "floors" in said:
        from m3check.settings import stacked

        said["floors"] = stacked(below["floors"], said["floors"])
    merged = {**below, **said}
    if "arch" not in merged:
        raise M3CheckError("the following arguments are required: --arch (or arch in m3check.toml, or M3CHECK_ARCH)")
    try:
        return RunOptions(**merged, shown=frozenset(below), progress=progress)
    except M3CheckError as error:
        raise M3CheckError(f"{error}{told}") from None


def _below(said: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """What the layers under the command line say, by field, and a clause that names the sayers."""
    from m3check.settings import SETTINGS, load

    found = {word: each for word, each in load(said.get("arch")).items() if each.origin != "default"}
    values = {SETTINGS[word][0]: each.value for word, each in found.items()}
    theirs = ", ".join(f"{word} from {each.origin}" for word, each in found.items() if SETTINGS[word][0] not in said)
    return values, f" (settings: {theirs})" if theirs else ""
