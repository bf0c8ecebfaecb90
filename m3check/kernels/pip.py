"""Where a published wheel is, which only pip knows: the user's indexes, proxies and credentials are its business."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from m3check.kernels.project import Project
from m3check.kernels.wheelfile import with_kernels
from m3check.types import M3CheckError

PIP_SECONDS = 1800
"""Time limit for a pip that hangs; a network that does not answer ends by pip's own, much shorter, limits."""


def address(project: Project, version: str) -> str:
    """Where pip would download the wheel from."""
    with tempfile.TemporaryDirectory(prefix="m3check-") as folder:
        options = ["install", "--dry-run", "--ignore-installed", "--report", "-", "--target", folder]
        report = json.loads(_pip([*options, *_selection(project, version)], project, version))
    url: str = report["install"][0]["download_info"]["url"]
    return url


def download(project: Project, version: str, folder: Path) -> Path:
    """Have pip download the whole wheel into a folder."""
    _pip(["download", "--dest", str(folder), *_selection(project, version)], project, version)
    return next(folder.glob("*.whl"))


def _selection(project: Project, version: str) -> list[str]:
    """pip's options for this wheel alone, for Linux, so that it is found from any machine and any Python."""
    platforms = ["manylinux1_x86_64", "manylinux2014_x86_64", *(f"manylinux_2_{n}_x86_64" for n in range(17, 46))]
    options = [word for name in platforms for word in ("--platform", name)]
    python = ["--python-version", "3.12", "--implementation", "cp"]
    return [*options, *python, "--only-binary=:all:", "--no-deps", f"{project.name}=={version}"]


def _pip(arguments: list[str], project: Project, version: str) -> str:
    wanted = f"{project.name}=={version}"
    quiet = ["--quiet", "--disable-pip-version-check", "--no-input", "--retries", "2"]
    command = [sys.executable, "-m", "pip", *arguments, *quiet]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise M3CheckError(f"pip did not find {wanted} within {PIP_SECONDS} s; is the network reachable?") from error
    if done.returncode == 0:
        return done.stdout
    if "No module named pip" in done.stderr:
        raise M3CheckError(
            f"{wanted} is found by pip, which {sys.executable} does not have; install pip, or name a wheel or "
            f"checkout with {project.name}:PATH"
        )
    listed = re.search(r"\(from versions: ([^)]*)\)", done.stderr)
    versions = listed[1].split(", ") if listed and listed[1] not in ("", "none") else []
    if versions and version not in versions:
        raise M3CheckError(f"there is no {project.name} {version}; {with_kernels(project, versions)}")
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    raise M3CheckError(f"pip could not find {wanted} (is the network reachable?): {lines[-1] if lines else 'no message'}")
