"""The journal of a run: a JSON line a result, appended as it comes, so that a killed run loses nothing and can go on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from m3check.types import M3CheckError, Result

Key = tuple[str, str, str]
"""case id, provider, evidence."""


def key(result: Result) -> Key:
    """What makes a result the same one in a resumed run."""
    return result.case, result.provider, result.evidence


class Journal:
    """An open journal file; results of an earlier run with the same fingerprint are in `earlier`."""

    def __init__(self, path: Path, fingerprint: Mapping[str, Any], resume: bool) -> None:
        self.path = path
        self.earlier: dict[Key, Result] = {}
        if resume and path.exists():
            self.earlier = _read(path, fingerprint)
            self._file = path.open("a", encoding="utf-8")
            self._end_torn_line()
        else:
            self._file = path.open("w", encoding="utf-8")
            self._write({"m3check_journal": 1, "fingerprint": dict(fingerprint)})

    def append(self, result: Result) -> None:
        """Write one result through to the operating system; raises OSError when the disk is full."""
        self._write(msgspec.to_builtins(result))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, data: Any) -> None:
        self._file.write(json.dumps(data, separators=(",", ":")) + "\n")
        self._file.flush()

    def _end_torn_line(self) -> None:
        with self.path.open("rb") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":
                    self._file.write("\n")


def _read(path: Path, fingerprint: Mapping[str, Any]) -> dict[Key, Result]:
    """Results of an earlier run; a line torn by a kill is left out and run again."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    try:
        header = json.loads(lines[0])["fingerprint"]
    except (IndexError, KeyError, TypeError, ValueError):
        raise M3CheckError(f"{path} is not a journal of m3check; remove it, or run without --resume") from None
    for name, value in fingerprint.items():
        if header.get(name) != value:
            raise M3CheckError(
                f"cannot resume {path}: it was made with {name} {header.get(name)!r}, this run has {value!r}; "
                "run without --resume to start anew"
            )
    earlier = {}
    for line in lines[1:]:
        try:
            result = msgspec.convert(json.loads(line), Result)
        except (ValueError, msgspec.ValidationError):
            continue
        earlier[key(result)] = result
    return earlier
