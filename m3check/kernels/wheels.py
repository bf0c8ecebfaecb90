"""Fetching the few kernel files of a published wheel: found by pip, read by range requests, checked, cached.

The files are code that will run with the user's rights, so each is compared with the wheel's own RECORD and, for versions
that m3check knows, with hashes that it ships. They are compared again before every use.
"""

from __future__ import annotations

import base64
import csv
import errno
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from m3check.types import M3CheckError

WANTED = ("vllm/models/minimax_m3/",)
"""Folders of the wheel whose .py files are read; one list for every op, so that a new op adds a line."""

LARGEST_FILE = 4 << 20
"""Bytes; the largest kernel file published so far has 0.07 MB, and a damaged or hostile archive may claim anything."""

PIP_SECONDS = 1800
"""Time limit for a pip that hangs; a network that does not answer ends by pip's own, much shorter, limits."""


@dataclass(frozen=True)
class Files:
    """A wheel's kernel files on disk, checked."""

    folder: Path
    """Holds `vllm/…`."""
    version: str
    hashes: Mapping[str, str]
    """sha256 of each file, in hex, by its path inside the wheel."""
    warnings: tuple[str, ...] = ()


def known_versions() -> Mapping[str, Mapping[str, str]]:
    """The published versions that have the kernels: sha256 of each wanted file."""
    text = resources.files("m3check").joinpath("data", "known_wheels.json").read_text()
    known: dict[str, dict[str, str]] = json.loads(text)["vllm"]
    return known


def cache_folder() -> Path:
    """Where fetched files are kept: $M3CHECK_CACHE, else the user's cache."""
    chosen = os.environ.get("M3CHECK_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute() / "wheels"
    import platformdirs

    return Path(platformdirs.user_cache_dir("m3check")) / "wheels"


def published(version: str, offline: bool = False) -> Files:
    """The kernel files of vllm==version: from the cache, else fetched into it (never when offline)."""
    folder = cache_folder() / f"vllm-{version}"
    warnings: list[str] = []
    if folder.is_dir():
        try:
            return _checked(folder)
        except M3CheckError as error:
            if offline:
                raise
            warnings.append(f"{error}; fetched anew")
            _remove(folder)
    if offline:
        have = ", ".join(sorted(p.name.removeprefix("vllm-") for p in cache_folder().glob("vllm-*"))) or "none"
        raise M3CheckError(
            f"vllm=={version} is not in the cache {cache_folder()} and --offline forbids fetching it; cached: {have}. "
            "Run once without --offline, or name a wheel or checkout with vllm:PATH"
        )
    _store(folder, lambda target: _fetch(version, target, warnings))
    files = _checked(folder)
    return replace(files, warnings=(*warnings, *files.warnings))


def unpacked(wheel: Path) -> Files:
    """The kernel files of a wheel file, in a folder of the cache named by the wheel's own hash."""
    match = re.match(r"vllm-([^-]+)-.*\.whl$", wheel.name)
    if not match:
        raise M3CheckError(f"{wheel} is not named like a vllm wheel (vllm-VERSION-….whl)")
    try:
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    except OSError as error:
        raise M3CheckError(f"cannot read {wheel}: {error.strerror}") from error
    folder = cache_folder() / "files" / f"vllm-{match[1]}-{digest[:16]}"
    if folder.is_dir():
        try:
            return _checked(folder, own=True)
        except M3CheckError:
            _remove(folder)
    _store(folder, lambda target: _extract_wheel(wheel, target), own=True)
    return _checked(folder, own=True)


# Fetching.


def _fetch(version: str, target: Path, warnings: list[str]) -> None:
    url = _address(version)
    parts = urlsplit(url)
    if parts.scheme == "file":
        _extract_wheel(Path(unquote(parts.path)), target)
        return
    from remotezip import RemoteZip

    try:
        with RemoteZip(url) as archive:
            _extract(archive, target, f"vllm {version}")
    except M3CheckError:
        raise
    except Exception as error:  # servers without range requests, proxies, TLS: pip may still manage
        warnings.append(
            f"could not read single files of vllm {version}'s wheel ({_short(error)}); the whole wheel was downloaded"
        )
        with tempfile.TemporaryDirectory(prefix="m3check-") as folder:
            _pip(["download", "--dest", folder, *_selection(version)], version)
            _extract_wheel(next(Path(folder).glob("*.whl")), target)


def _address(version: str) -> str:
    """Where pip would download the wheel from."""
    with tempfile.TemporaryDirectory(prefix="m3check-") as folder:
        options = ["install", "--dry-run", "--ignore-installed", "--report", "-", "--target", folder]
        report = json.loads(_pip([*options, *_selection(version)], version))
    url: str = report["install"][0]["download_info"]["url"]
    return url


def _selection(version: str) -> list[str]:
    """pip's options for this wheel alone, for Linux, so that it is found from any machine and any Python."""
    platforms = ["manylinux1_x86_64", "manylinux2014_x86_64", *(f"manylinux_2_{n}_x86_64" for n in range(17, 46))]
    options = [word for name in platforms for word in ("--platform", name)]
    return [
        *options,
        "--python-version",
        "3.12",
        "--implementation",
        "cp",
        "--only-binary=:all:",
        "--no-deps",
        f"vllm=={version}",
    ]


def _pip(arguments: list[str], version: str) -> str:
    command = [
        sys.executable,
        "-m",
        "pip",
        *arguments,
        "--quiet",
        "--disable-pip-version-check",
        "--no-input",
        "--retries",
        "2",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise M3CheckError(f"pip did not find vllm=={version} within {PIP_SECONDS} s; is the network reachable?") from error
    if done.returncode == 0:
        return done.stdout
    if "No module named pip" in done.stderr:
        raise M3CheckError(
            f"vllm=={version} is found by pip, which {sys.executable} does not have; install pip, or name a wheel or "
            "checkout with vllm:PATH"
        )
    listed = re.search(r"\(from versions: ([^)]*)\)", done.stderr)
    versions = listed[1].split(", ") if listed and listed[1] not in ("", "none") else []
    if versions and version not in versions:
        raise M3CheckError(f"there is no vllm {version}; {_with_kernels(versions)}")
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    raise M3CheckError(
        f"pip could not find vllm=={version} (is the network reachable?): {lines[-1] if lines else 'no message'}"
    )


def _with_kernels(published: list[str] | None = None) -> str:
    known = list(known_versions())
    newest = max(map(_order, known), default=())
    newer = [v for v in published or [] if _order(v) > newest]
    return f"versions with MiniMax-M3 kernels: {', '.join([*known, *newer])}"


def _order(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version)[:4])


# Unpacking.


def _extract_wheel(wheel: Path, target: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            _extract(archive, target, wheel.name)
    except (OSError, zipfile.BadZipFile) as error:
        raise M3CheckError(f"cannot read the wheel {wheel}: {error}") from error


def _extract(archive: zipfile.ZipFile, target: Path, name: str) -> None:
    """Write the wanted members and RECORD below `target`; no other byte of the archive reaches the disk."""
    members = [m for m in archive.infolist() if _wanted(m.filename) or _is_record(m.filename)]
    if not any(_is_record(m.filename) for m in members):
        raise M3CheckError(f"{name} has no RECORD, so its files cannot be checked")
    if not any(_wanted(m.filename) for m in members):
        raise M3CheckError(f"{name} has no MiniMax-M3 kernels (nothing in {', '.join(WANTED)}); {_with_kernels()}")
    for member in members:
        path = _safe(member.filename, name)
        if member.file_size > LARGEST_FILE:
            raise M3CheckError(f"{name}: {member.filename} claims {member.file_size} bytes; refused")
        destination = target / path
        destination.parent.mkdir(parents=True, exist_ok=True)
        destination.write_bytes(archive.read(member))


def _wanted(path: str) -> bool:
    return path.startswith(WANTED) and path.endswith(".py")


def _is_record(path: str) -> bool:
    return re.fullmatch(r"vllm-[^/]+\.dist-info/RECORD", path) is not None


def _safe(path: str, name: str) -> PurePosixPath:
    """A member's path if it stays below the folder it is unpacked into."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in path.split("/") or "\\" in path or ":" in path or "\0" in path:
        raise M3CheckError(f"{name} has a member that would be written outside its folder: {path!r}; refused")
    return pure


# Checking.


def _checked(folder: Path, own: bool = False) -> Files:
    """Compare a folder's files with its RECORD and, where the version is known, with the shipped hashes.

    A wheel file that the user has made (`own`) may differ from the published version of its name, and is told apart.
    """
    records = list(folder.glob("vllm-*.dist-info/RECORD"))
    if len(records) != 1:
        raise M3CheckError(f"{folder} has no RECORD, so its files cannot be checked")
    version = records[0].parent.name.removeprefix("vllm-").removesuffix(".dist-info")
    recorded = _recorded(records[0], version)
    hashes: dict[str, str] = {}
    for path in sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.py")):
        hashes[path] = hashlib.sha256((folder / path).read_bytes()).hexdigest()
        if recorded.get(path) != hashes[path]:
            raise M3CheckError(f"{folder / path} is not what vllm {version}'s RECORD says: sha256 {hashes[path][:16]}…")
    lost = sorted(set(recorded) - set(hashes))
    if lost:
        raise M3CheckError(f"{folder} lacks {lost[0]}, which vllm {version}'s RECORD has")
    known = known_versions().get(version)
    if known is None:
        note = (
            f"vllm {version} is not a version whose hashes m3check ships: its files agree with the wheel's own RECORD only"
        )
        return Files(folder, version, hashes, (note,))
    changed = sorted(path for path in known.keys() | hashes.keys() if known.get(path) != hashes.get(path))
    if changed and own:
        note = f"this wheel is not the published vllm {version}: {len(changed)} kernel file(s) differ, first {changed[0]}"
        return Files(folder, version, hashes, (note,))
    if changed:
        raise M3CheckError(f"{folder / changed[0]} is not the file that vllm {version} was published with; refused")
    return Files(folder, version, hashes)


def _recorded(record: Path, version: str) -> dict[str, str]:
    """sha256 in hex of each wanted file, from a RECORD."""
    found = {}
    for row in csv.reader(io.StringIO(record.read_text(encoding="utf-8"))):
        if len(row) < 2 or not _wanted(row[0]):
            continue
        _safe(row[0], f"vllm {version}'s RECORD")
        algorithm, _, digest = row[1].partition("=")
        if algorithm != "sha256":
            raise M3CheckError(f"vllm {version}'s RECORD has no sha256 for {row[0]}")
        found[row[0]] = base64.urlsafe_b64decode(digest + "=" * (-len(digest) % 4)).hex()
    return found


# The cache.


def _store(folder: Path, fill: Callable[[Path], None], own: bool = False) -> None:
    """Fill a new folder, check it and put it in place at once; whoever came first stays."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))
    except OSError as error:
        raise M3CheckError(f"cannot write to the cache {folder.parent}: {error.strerror}; set M3CHECK_CACHE") from error
    try:
        fill(temporary)
        _checked(temporary, own)
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
