"""Compiles a specialisation for a target, once: the outcome is kept in the user's cache, by all that decides it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from m3check.compiled import figures
from m3check.compiled.capture import Specialisation
from m3check.compiled.figures import Figures
from m3check.compiled.source import error_of
from m3check.types import M3CheckError

FORMAT = 1
"""Counted up whenever what is read from a compilation changes."""


@dataclass(frozen=True)
class Built:
    """What became of one specialisation."""

    key: str
    """Hash of everything that decides the outcome."""
    figures: Figures | None = None
    """None where it does not compile."""
    kind: str = ""
    """Class of the error."""
    error: str = ""
    where: str = ""
    """Source line of the error, as file:line."""


def cache_folder() -> Path:
    """Where outcomes are kept: beside the wheels, in $M3CHECK_CACHE, else the user's cache."""
    chosen = os.environ.get("M3CHECK_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute() / "compiled"
    import platformdirs

    return Path(platformdirs.user_cache_dir("m3check")) / "compiled"


def key_of(found: Specialisation, target: Any) -> str:
    """Hash of source, specialisation, options, target, Triton and its assembler."""
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.compiler.compiler import make_backend
    from triton.runtime.cache import get_cache_key

    whole = get_cache_key(found.source, make_backend(target), found.options, get_cache_invalidating_env_vars())
    # Triton's key has no names; the kernel's is part of the outcome, and an error's line depends on the file.
    return hashlib.sha256(f"{FORMAT} {found.name} {target} {whole}".encode()).hexdigest()


def build_all(
    wanted: Sequence[Specialisation], target: Any, compiling: Callable[[bool], None] = lambda began: None
) -> list[Built]:
    """The outcome of each specialisation, in order; `compiling` hears when compilation begins and ends.

    Processes that want the same one do not compile it twice: what another is compiling is left for last and waited for.
    """
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise M3CheckError(f"cannot write to the cache {folder}: {error.strerror}; set M3CHECK_CACHE") from error
    keys = [key_of(each, target) for each in wanted]
    done: dict[str, Built] = {}
    pending = dict(zip(keys, wanted, strict=True))
    for wait in (False, True):
        for key, each in list(pending.items()):
            outcome = _kept(folder / f"{key}.json")
            if outcome is None:
                compiling(True)  # waiting for another process is compilation, too
                with _lock(folder / f"{key}.lock", wait) as mine:
                    if mine:
                        outcome = _kept(folder / f"{key}.json") or _compile(each, target, key)
                        _keep(folder / f"{key}.json", outcome)
                compiling(False)
            if outcome is None:
                continue
            done[key] = outcome
            del pending[key]
    return [done[key] for key in keys]


def _kept(file: Path) -> Built | None:
    try:
        return msgspec.json.decode(file.read_bytes(), type=Built)
    except (OSError, msgspec.DecodeError):
        return None


def _keep(file: Path, outcome: Built) -> None:
    temporary = file.with_suffix(f".{os.getpid()}")
    try:
        temporary.write_bytes(msgspec.json.encode(outcome))
        temporary.replace(file)
    except OSError:  # a full disk costs time later, not the result
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _lock(file: Path, wait: bool) -> Iterator[bool]:
    with file.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            file.unlink(missing_ok=True)


def _compile(found: Specialisation, target: Any, key: str) -> Built:
    import triton.compiler
    from triton import knobs

    heard: list[str] = []
    try:
        with tempfile.TemporaryDirectory(prefix="m3check-") as folder, knobs.cache.scope(), _quiet(heard):
            knobs.cache.dir = folder
            compiled = triton.compiler.compile(found.source, target=target, options=dict(found.options.__dict__))
            return Built(key, figures.read(compiled))
    except Exception as error:
        text, where = error_of(error, found.function, "".join(heard))
        return Built(key, None, type(error).__name__, text, where)


@contextlib.contextmanager
def _quiet(heard: list[str]) -> Iterator[None]:
    """Keep what Triton prints, and what its passes write to the process's stderr where that is a file, as in a worker."""
    printed = io.StringIO()
    status = os.fstat(2)
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        if stat.S_ISREG(status.st_mode):
            with contextlib.suppress(OSError):
                heard.append(os.pread(2, 1 << 16, status.st_size).decode(errors="replace"))
        heard.append(re.sub(r"(?s)//\n// Generated by LLVM.*", "", printed.getvalue()))
