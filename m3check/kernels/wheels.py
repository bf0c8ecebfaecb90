"""Kernel files of published wheels and of wheel files, kept in the user's cache: fetched once, checked before every use."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from m3check.kernels import pip
from m3check.kernels.project import Project
from m3check.kernels.wheelfile import Files, checked, extract, extract_wheel
from m3check.types import M3CheckError


def cache_folder() -> Path:
    """Where fetched files are kept: $M3CHECK_CACHE, else the user's cache."""
    chosen = os.environ.get("M3CHECK_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute() / "wheels"
    import platformdirs

    return Path(platformdirs.user_cache_dir("m3check")) / "wheels"


def published(project: Project, version: str, offline: bool = False) -> Files:
    """The kernel files of project==version: from the cache, else fetched into it (never when offline)."""
    folder = cache_folder() / f"{project.key}-{version}"
    warnings: list[str] = []
    if folder.is_dir():
        try:
            return checked(project, folder)
        except M3CheckError as error:
            if offline:
                raise
            warnings.append(f"{error}; fetched anew")
            _remove(folder)
    if offline:
        prefix = f"{project.key}-"
        have = ", ".join(sorted(p.name.removeprefix(prefix) for p in cache_folder().glob(f"{prefix}*"))) or "none"
        raise M3CheckError(
            f"{project.name}=={version} is not in the cache {cache_folder()} and --offline forbids fetching it; cached: "
            f"{have}. Run once without --offline, or name a wheel or checkout with {project.name}:PATH"
        )
    _store(project, folder, lambda target: _fetch(project, version, target, warnings))
    files = checked(project, folder)
    return replace(files, warnings=(*warnings, *files.warnings))


def unpacked(project: Project, wheel: Path) -> Files:
    """The kernel files of a wheel file, in a folder of the cache named by the wheel's own hash."""
    match = re.match(rf"{project.name}-([^-]+)-.*\.whl$", wheel.name)
    if not match:
        raise M3CheckError(f"{wheel} is not named like a {project.name} wheel ({project.name}-VERSION-….whl)")
    try:
        with wheel.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise M3CheckError(f"cannot read {wheel}: {error.strerror}") from error
    folder = cache_folder() / "files" / f"{project.key}-{match[1]}-{digest[:16]}"
    if folder.is_dir():
        try:
            return checked(project, folder, own=True)
        except M3CheckError:
            _remove(folder)
    _store(project, folder, lambda target: extract_wheel(project, wheel, target), own=True)
    return checked(project, folder, own=True)


def _fetch(project: Project, version: str, target: Path, warnings: list[str]) -> None:
    url = pip.address(project, version)
    parts = urlsplit(url)
    if parts.scheme == "file":
        extract_wheel(project, Path(unquote(parts.path)), target)
        return
    from remotezip import RemoteZip

    try:
        with RemoteZip(url) as archive:
            extract(project, archive, target, f"{project.name} {version}")
    except M3CheckError:
        raise
    except Exception as error:  # servers without range requests, proxies, TLS: pip may still manage
        warnings.append(
            f"could not read single files of {project.name} {version}'s wheel ({_short(error)}); the whole wheel was "
            "downloaded"
        )
        with tempfile.TemporaryDirectory(prefix="m3check-") as folder:
            extract_wheel(project, pip.download(project, version, Path(folder)), target)


def _store(project: Project, folder: Path, fill: Callable[[Path], None], own: bool = False) -> None:
    """Fill a new folder, check it and put it in place at once; whoever came first stays."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))
    except OSError as error:
        raise M3CheckError(f"cannot write to the cache {folder.parent}: {error.strerror}; set M3CHECK_CACHE") from error
    try:
        fill(temporary)
        checked(project, temporary, own)
        temporary.rename(folder)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise M3CheckError(f"cannot write to the cache {folder.parent}: {error.strerror}; set M3CHECK_CACHE") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Take a folder out of the cache in one step, then delete it."""
    try:
        with tempfile.TemporaryDirectory(prefix=".old-", dir=folder.parent, ignore_cleanup_errors=True) as grave:
            folder.rename(Path(grave) / folder.name)
    except FileNotFoundError:
        pass  # another process has just done the same
    except OSError as error:
        raise M3CheckError(f"cannot replace {folder}: {error.strerror}; delete it, or set M3CHECK_CACHE") from error


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:159]}…"
