"""Where a project's kernel files are: installed, in the cache of published wheels, in a wheel file, or in a folder."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import traceback
from dataclasses import dataclass
from pathlib import Path

from m3check.kernels import wheels
from m3check.kernels.project import VLLM, Project
from m3check.kernels.provider import Spec
from m3check.types import M3CheckError

TREE = VLLM.trees[0]


@dataclass(frozen=True)
class Source:
    """Kernel files on disk."""

    folder: Path
    """Holds the package's folder, `vllm/…`."""
    version: str
    origin: str
    warnings: tuple[str, ...] = ()


class Sources:
    """The kernel files of each spec of one project, looked for once in a process."""

    def __init__(self, project: Project) -> None:
        self._project = project
        self._held: dict[Spec, Source | None] = {}

    def prepare(self, spec: Spec, offline: bool) -> tuple[str, ...]:
        """Find or fetch the files; raises M3CheckError where there are none. Returns what the user should know of them."""
        self._held[spec] = source = locate(spec, offline, self._project)
        return source.warnings

    def here(self, spec: Spec) -> Source | None:
        """The files as far as this machine has them; nothing is fetched."""
        if spec not in self._held:
            try:
                self._held[spec] = locate(spec, True, self._project)
            except M3CheckError:
                self._held[spec] = None
        return self._held[spec]


def locate(spec: Spec, offline: bool, project: Project = VLLM) -> Source:
    """The kernel files that a spec names."""
    if spec.version:
        files = wheels.published(project, spec.version, offline)
        return Source(files.folder, files.version, "published wheel", files.warnings)
    if spec.path:
        return _at(project, Path(spec.path))
    return _installed(project)


def import_failure(source: Source, project: Project, module: str, error: Exception) -> M3CheckError:
    """What to raise where a module of the files raised while it was imported: the innermost line of theirs, and why."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(str(source.folder))]
    file = source.folder.joinpath(*module.split(".")).with_suffix(".py")
    where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else str(file)
    return M3CheckError(f"{project.name} {source.version}: {where} does not import: {type(error).__name__}: {error}")


def _installed(project: Project) -> Source:
    name = project.name
    found = importlib.util.find_spec(name)
    folders = list(found.submodule_search_locations or []) if found else []
    for folder in folders:
        if _has_kernels(project, Path(folder).parent):
            return Source(Path(folder).parent, importlib.metadata.version(name), "installed")
    if folders:
        installed = f"the installed {name} {importlib.metadata.version(name)}"
        raise M3CheckError(f"{installed} has no MiniMax-M3 kernels ({project.trees[0]}); they came with {project.first}")
    raise M3CheckError(
        f"{name} is not installed here; name a published version ({name}=={project.example}) or a checkout, site-packages "
        f"folder or wheel ({name}:PATH)"
    )


def _at(project: Project, path: Path) -> Source:
    name = project.name
    if path.suffix == ".whl" and path.is_file():
        files = wheels.unpacked(project, path)
        return Source(files.folder, files.version, f"wheel {path.name}", files.warnings)
    for folder in (path, path / "python", path.parent if path.name == name else path):
        if _has_kernels(project, folder):
            return Source(folder, _version_beside(project, folder), str(path))
    wanted = f"a checkout, a site-packages folder, a folder that holds {name}/, or a .whl file"
    if not path.exists():
        raise M3CheckError(f"{name}:PATH: there is nothing at {path}; wanted {wanted}")
    raise M3CheckError(f"{name}:PATH: {path} has no {' and no '.join(project.trees)}; wanted {wanted}")


def _has_kernels(project: Project, folder: Path) -> bool:
    return any((folder / tree).is_dir() for tree in project.trees)


def _version_beside(project: Project, folder: Path) -> str:
    """The version of a folder that holds the package, from its dist-info or from the file that its build wrote."""
    prefix, suffix = f"{project.name}-", ".dist-info"
    infos = sorted(p.name for p in folder.glob(f"{prefix}*{suffix}"))
    if infos:
        return infos[-1].removeprefix(prefix).removesuffix(suffix)
    try:
        text = (folder / project.name / "_version.py").read_text()
    except OSError:
        return "unknown"
    match = re.search(r"""^(?:__version__|version)\b[^'"]*['"]([^'"]+)""", text, re.M)
    return match[1] if match else "unknown"
