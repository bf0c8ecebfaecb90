"""The arrows of docs/design.md: the five packages never import each other, and what answers at once never imports torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import m3check

ROOT = Path(m3check.__file__).parent
PACKAGES = ("reference", "cases", "kernels", "checks", "report")
SHARED = {"m3check", "m3check.types", "m3check.arch", "m3check.paging"}


def imported(path: Path) -> set[str]:
    """Modules of m3check that a file imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "m3check" else {node.module}
    return {name for name in found if name.split(".")[0] == "m3check"}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_itself_and_the_shared_words(package):
    for path in (ROOT / package).rglob("*.py"):
        foreign = {n for n in imported(path) if n not in SHARED and not n.startswith(f"m3check.{package}")}
        foreign -= {"m3check.Case", "m3check.Profile", "m3check.__version__"}
        assert not foreign, f"{path.relative_to(ROOT)} imports {sorted(foreign)}"


@pytest.mark.parametrize(
    "module",
    ["m3check", "m3check.cli", "m3check.types", "m3check.arch", "m3check.config", "m3check.cases", "m3check.kernels"],
)
def test_importing_it_does_not_import_torch(module):
    code = f"import sys, {module}; print([m for m in ('torch', 'triton', 'numpy', 'vllm') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]", f"importing {module} imports {out.strip()}"
