"""Where MSA's package `fmha_sm100` is: vendored in an installed vLLM, installed by itself, or in a folder."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from m3check.kernels.provider import Spec
from m3check.types import M3CheckError

VENDORED = "vllm.third_party.fmha_sm100"
OWN = "fmha_sm100"

TOOLKITS = ("/usr/local/cuda", "/opt/cuda")
"""Where MSA looks for CUDA last."""

_IN_FOLDER = (  # (from the folder to what must be importable, the package's name from there)
    ("python", OWN),
    ("", OWN),
    ("", VENDORED),
    ("..", OWN),
)


@dataclass(frozen=True)
class Found:
    """The package, not yet imported."""

    package: str
    """Its dotted name: inside vLLM, where CuteDSL scoring and CUTLASS decode stand beside it, or by itself."""
    path: str = ""
    """What sys.path must have; empty where it has it."""
    version: str = "unknown"
    origin: str = "installed"


def locate(spec: Spec) -> Found:
    """The package that a spec names; raises M3CheckError where there is none. Imports nothing."""
    if spec.path:
        return _at(Path(spec.path))
    vllm = in_vllm()
    if vllm is not None:
        return vllm
    if _folders(OWN):
        return Found(OWN, version=_version(OWN))
    raise M3CheckError(
        "fmha_sm100 is not installed here: neither a vLLM with vllm/third_party/fmha_sm100 (0.24.0 and newer, for CUDA) "
        "nor MSA by itself; install one, or name a checkout of vllm-project/MSA (fmha_sm100:PATH)"
    )


def in_vllm() -> Found | None:
    """The package inside the installed vLLM, or None."""
    for folder in _folders("vllm"):
        if (folder / "third_party/fmha_sm100/api.py").is_file():
            return Found(VENDORED, version=_version("vllm"))
    return None


def beside(folder: Path, version: str) -> Found | None:
    """The package in a folder that holds vllm/, or None."""
    there = (folder / "vllm/third_party/fmha_sm100/api.py").is_file()
    return Found(VENDORED, str(folder), version, str(folder)) if there else None


def warnings() -> tuple[str, ...]:
    """What MSA will miss when it is called, by its own rule: the compiler of all but its CuTe-DSL kernels."""
    if os.environ.get("CUDA_HOME") or shutil.which("nvcc") or any(map(os.path.isdir, TOOLKITS)):
        return ()
    return ("MSA compiles kernels with nvcc when they are first called, and none is here: install CUDA, or set CUDA_HOME",)


def _at(path: Path) -> Found:
    for step, package in _IN_FOLDER:
        top = (path / step).resolve()
        if top.joinpath(*package.split("."), "api.py").is_file() and (step != ".." or path.name == OWN):
            return Found(package, str(top), origin=str(path))
    wanted = "a checkout of MSA (python/fmha_sm100/api.py), or a folder that holds fmha_sm100/ or vllm/"
    if not path.exists():
        raise M3CheckError(f"fmha_sm100:PATH: there is nothing at {path}; wanted {wanted}")
    raise M3CheckError(f"fmha_sm100:PATH: {path} has no fmha_sm100/api.py; wanted {wanted}")


def _folders(package: str) -> list[Path]:
    try:
        found = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return []
    return [Path(folder) for folder in (found.submodule_search_locations or [])] if found else []


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
