"""Where vLLM's kernel files are: installed, in the cache of published wheels, in a wheel file, or in a folder."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from m3check.kernels import wheels
from m3check.kernels.provider import Spec
from m3check.types import M3CheckError

TREE = "vllm/models/minimax_m3"


@dataclass(frozen=True)
class Source:
    """Kernel files on disk."""

    folder: Path
    """Holds `vllm/…`."""
    version: str
    origin: str
    warnings: tuple[str, ...] = ()


def locate(spec: Spec, offline: bool) -> Source:
    """The kernel files that a spec names."""
    if spec.version:
        files = wheels.published(spec.version, offline)
        return Source(files.folder, files.version, "published wheel", files.warnings)
    if spec.path:
        return _at(Path(spec.path))
    return _installed()


def _installed() -> Source:
    found = importlib.util.find_spec("vllm")
    folders = list(found.submodule_search_locations or []) if found else []
    for folder in folders:
        if Path(folder).joinpath(*TREE.split("/")[1:]).is_dir():
            return Source(Path(folder).parent, importlib.metadata.version("vllm"), "installed")
    if folders:
        version = importlib.metadata.version("vllm")
        raise M3CheckError(f"the installed vllm {version} has no MiniMax-M3 kernels ({TREE}); they came with 0.24.0")
    raise M3CheckError(
        "vllm is not installed here; name a published version (vllm==0.33.0) or a checkout, site-packages folder or wheel "
        "(vllm:PATH)"
    )


def _at(path: Path) -> Source:
    if path.suffix == ".whl" and path.is_file():
        files = wheels.unpacked(path)
        return Source(files.folder, files.version, f"wheel {path.name}", files.warnings)
    for folder in (path, path.parent if path.name == "vllm" else path):
        if (folder / TREE).is_dir():
            return Source(folder, _version_beside(folder), str(path))
    wanted = "a checkout, a site-packages folder, a folder that holds vllm/, or a .whl file"
    if not path.exists():
        raise M3CheckError(f"vllm:PATH: there is nothing at {path}; wanted {wanted}")
    raise M3CheckError(f"vllm:PATH: {path} has no {TREE}; wanted {wanted}")


def _version_beside(folder: Path) -> str:
    """The version of a folder that holds vllm/, from its dist-info or from the file that its build wrote."""
    infos = sorted(p.name for p in folder.glob("vllm-*.dist-info"))
    if infos:
        return infos[-1].removeprefix("vllm-").removesuffix(".dist-info")
    try:
        match = re.search(
            r"""^(?:__version__|version)\b[^'"]*['"]([^'"]+)""", (folder / "vllm/_version.py").read_text(), re.M
        )
    except OSError:
        match = None
    return match[1] if match else "unknown"
