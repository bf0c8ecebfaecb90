"""Files that appear whole or not at all, and whether a folder can take them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from m3check.types import M3CheckError


def write_text(path: Path, text: str) -> Path:
    """Write UTF-8 beside the target and rename, so that a reader or a crash never meets half a file."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def check_writable(folder: Path) -> None:
    """Raise M3CheckError, before anything has run, where reports could not be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"m3check")
            file.flush()
    except OSError as error:
        raise M3CheckError(
            f"the output folder {folder} cannot be written ({error.strerror}); name another with --out DIR"
        ) from error


def _umask() -> int:
    # mkstemp makes private files; a report is as readable as any other file of its user.
    mask = os.umask(0)
    os.umask(mask)
    return mask
