"""What is inside a wheel: taking the few kernel files out of it, and checking that they are what was published.

The files are code that will run with the user's rights, so each is compared with the wheel's own RECORD and, for versions
that m3check knows, with hashes that it ships.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePosixPath

from m3check.kernels.project import Project
from m3check.types import M3CheckError

LARGEST_FILE = 4 << 20
"""Bytes; the largest kernel file published so far has 0.07 MB, and a damaged or hostile archive may claim anything."""


@dataclass(frozen=True)
class Files:
    """A wheel's kernel files on disk, checked."""

    folder: Path
    """Holds the package's folder, `vllm/…`."""
    version: str
    hashes: Mapping[str, str]
    """sha256 of each file, in hex, by its path inside the wheel."""
    warnings: tuple[str, ...] = ()


def known_versions(project: Project) -> Mapping[str, Mapping[str, str]]:
    """The published versions that have the kernels: sha256 of each wanted file."""
    text = resources.files("m3check").joinpath("data", "known_wheels.json").read_text()
    known: dict[str, dict[str, str]] = json.loads(text).get(project.key, {})
    return known


def with_kernels(project: Project, published: list[str] | None = None) -> str:
    """A clause that lists the versions with the kernels: the known ones, and those of `published` that are newer."""
    known = list(known_versions(project))
    newest = max(map(_order, known), default=())
    newer = [v for v in published or [] if _order(v) > newest]
    return f"versions with MiniMax-M3 kernels: {', '.join([*known, *newer])}"


def _order(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version)[:4])


def extract_wheel(project: Project, wheel: Path, target: Path) -> None:
    """`extract` from a wheel file on disk."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            extract(project, archive, target, wheel.name)
    except (OSError, zipfile.BadZipFile) as error:
        raise M3CheckError(f"cannot read the wheel {wheel}: {error}") from error


def extract(project: Project, archive: zipfile.ZipFile, target: Path, name: str) -> None:
    """Write the wanted members and RECORD below `target`; no other byte of the archive reaches the disk."""
    members = [m for m in archive.infolist() if _wanted(project, m.filename) or _is_record(project, m.filename)]
    if not any(_is_record(project, m.filename) for m in members):
        raise M3CheckError(f"{name} has no RECORD, so its files cannot be checked")
    if not any(_wanted(project, m.filename) for m in members):
        nothing = f"{name} has no MiniMax-M3 kernels (nothing in {', '.join(project.wanted)})"
        raise M3CheckError(f"{nothing}; {with_kernels(project)}")
    for member in members:
        path = _safe(member.filename, name)
        if member.file_size > LARGEST_FILE:
            raise M3CheckError(f"{name}: {member.filename} claims {member.file_size} bytes; refused")
        destination = target / path
        destination.parent.mkdir(parents=True, exist_ok=True)
        destination.write_bytes(archive.read(member))


def _wanted(project: Project, path: str) -> bool:
    return path.startswith(project.wanted) and path.endswith(".py")


def _is_record(project: Project, path: str) -> bool:
    return re.fullmatch(rf"{project.name}-[^/]+\.dist-info/RECORD", path) is not None


def _safe(path: str, name: str) -> PurePosixPath:
    """A member's path if it stays below the folder it is unpacked into."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in path.split("/") or "\\" in path or ":" in path or "\0" in path:
        raise M3CheckError(f"{name} has a member that would be written outside its folder: {path!r}; refused")
    return pure


def checked(project: Project, folder: Path, own: bool = False) -> Files:
    """Compare a folder's files with its RECORD and, where the version is known, with the shipped hashes.

    A wheel file that the user has made (`own`) may differ from the published version of its name, and is told apart.
    """
    records = list(folder.glob(f"{project.name}-*.dist-info/RECORD"))
    if len(records) != 1:
        raise M3CheckError(f"{folder} has no RECORD, so its files cannot be checked")
    version = records[0].parent.name.removeprefix(f"{project.name}-").removesuffix(".dist-info")
    named = f"{project.name} {version}"
    recorded = _recorded(project, records[0], version)
    hashes: dict[str, str] = {}
    for path in sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.py")):
        hashes[path] = hashlib.sha256((folder / path).read_bytes()).hexdigest()
        if recorded.get(path) != hashes[path]:
            raise M3CheckError(f"{folder / path} is not what {named}'s RECORD says: sha256 {hashes[path][:16]}…")
    lost = sorted(set(recorded) - set(hashes))
    if lost:
        raise M3CheckError(f"{folder} lacks {lost[0]}, which {named}'s RECORD has")
    known = known_versions(project).get(version)
    if known is None:
        note = f"{named} is not a version whose hashes m3check ships: its files agree with the wheel's own RECORD only"
        return Files(folder, version, hashes, (note,))
    changed = sorted(path for path in known.keys() | hashes.keys() if known.get(path) != hashes.get(path))
    if changed and own:
        note = f"this wheel is not the published {named}: {len(changed)} kernel file(s) differ, first {changed[0]}"
        return Files(folder, version, hashes, (note,))
    if changed:
        raise M3CheckError(f"{folder / changed[0]} is not the file that {named} was published with; refused")
    return Files(folder, version, hashes)


def _recorded(project: Project, record: Path, version: str) -> dict[str, str]:
    """sha256 in hex of each wanted file, from a RECORD."""
    found = {}
    for row in csv.reader(io.StringIO(record.read_text(encoding="utf-8"))):
        if len(row) < 2 or not _wanted(project, row[0]):
            continue
        _safe(row[0], f"{project.name} {version}'s RECORD")
        algorithm, _, digest = row[1].partition("=")
        if algorithm != "sha256":
            raise M3CheckError(f"{project.name} {version}'s RECORD has no sha256 for {row[0]}")
        found[row[0]] = base64.urlsafe_b64decode(digest + "=" * (-len(digest) % 4)).hex()
    return found
