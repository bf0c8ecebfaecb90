"""Where a provider's kernel sources are, and how a mutant of them is loaded: in a private folder, never in place."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from m3check import kernels
from m3check.arch import Arch
from m3check.kernels import Loaded, Spec
from m3check.kernels.provider import with_chains
from m3check.mutants.mutant import Mutant
from m3check.types import OPS, Evidence, Kernel

TILES = frozenset({"tiles.py", "profile.py", "__init__.py"})
"""Our files whose figures must not change a result: negative controls turn them, generic edits leave them alone."""


@dataclass(frozen=True)
class Sources:
    """The kernel files of one provider for one target."""

    spec: Spec
    name: str
    root: Path
    files: tuple[str, ...]
    """Relative to `root`; empty for a provider whose sources are not edited, only wrapped."""

    def read(self, file: str) -> bytes:
        """One file's text."""
        return (self.root / file).read_bytes()


def sources(spec: Spec, arch: Arch, offline: bool) -> Sources:
    """The files that a provider's kernels come from."""
    if spec.provider == "triton":
        root = Path(kernels.__file__).parent / "triton"
        files = tuple(sorted(path.name for path in root.glob("*.py") if path.name not in TILES))
        return Sources(spec, "triton", root, files)
    if spec.provider == "vllm":
        from m3check.kernels import vllm
        from m3check.kernels.locate import TREE, locate

        source = locate(spec, offline)
        choices, _ = vllm.choose(source, arch)
        prefix = TREE.replace("/", ".") + "."
        modules = sorted({choice.module.removeprefix(prefix) for choice in choices.values()})
        return Sources(spec, "vllm", source.folder / TREE, tuple(module.replace(".", "/") + ".py" for module in modules))
    return Sources(spec, spec.provider, Path(), ())


def load(origin: Sources, arch: Arch, evidence: Evidence, mutant: Mutant | None, folder: Path) -> Loaded:
    """The provider's kernels with a mutant's edits and wrapper; None: as they are. Raises what importing them raises."""
    spec = origin.spec
    if mutant is not None and mutant.edits:
        sys.dont_write_bytecode = True
        spec = _vllm_copy(origin, mutant, folder) if origin.name == "vllm" else _ours(origin, mutant, folder)
    loaded = kernels.load(spec, arch, evidence, True)
    if mutant is None:
        return loaded
    if mutant.prepare is not None:
        mutant.prepare()
    if mutant.wrapper is None and mutant.profile is None:
        return loaded
    single: dict[str, Kernel] = {}
    for op, kernel in loaded.kernels.items():
        if OPS[op].chain:
            continue
        if op in mutant.ops or not mutant.ops:
            profile = mutant.profile(kernel.profile) if mutant.profile else kernel.profile
            function = wrapped(kernel.function, mutant.wrapper) if mutant.wrapper else kernel.function
            kernel = replace(kernel, function=function, profile=profile)
        single[op] = kernel
    missing = {op: sentence for op, sentence in loaded.missing.items() if not OPS[op].chain}
    all_kernels, all_missing = with_chains(single, missing)
    return replace(loaded, kernels=all_kernels, missing=all_missing)


def wrapped(function: Callable[..., Any], wrapper: Callable[..., Any]) -> Callable[..., Any]:
    """The function with a wrapper around it, under its own signature."""
    import functools

    def call(**keywords: Any) -> Any:
        return wrapper(function, keywords)

    functools.update_wrapper(call, function)
    return call


def edited(source: bytes, mutant: Mutant, file: str) -> bytes:
    """A file's text with a mutant's edits, the last one first so that positions hold."""
    for edit in sorted((e for e in mutant.edits if e.file == file), key=lambda e: -e.start):
        source = source[: edit.start] + edit.new + source[edit.end :]
    return source


def _ours(origin: Sources, mutant: Mutant, folder: Path) -> Spec:
    for file in {edit.file for edit in mutant.edits}:
        (folder / file).write_bytes(edited(origin.read(file), mutant, file))
    package = importlib.import_module("m3check.kernels.triton")
    for name in [n for n in sys.modules if n.startswith("m3check.kernels.triton.")]:
        del sys.modules[name]
        vars(package).pop(name.rpartition(".")[2], None)
    package.__path__.insert(0, str(folder))
    importlib.invalidate_caches()
    return origin.spec


def _vllm_copy(origin: Sources, mutant: Mutant, folder: Path) -> Spec:
    from m3check.kernels.locate import TREE

    for branch in ("common", "amd", "nvidia"):
        if (origin.root / branch / "ops").is_dir():
            shutil.copytree(origin.root / branch / "ops", folder / TREE / branch / "ops")
    for file in {edit.file for edit in mutant.edits}:
        (folder / TREE / file).write_bytes(edited(origin.read(file), mutant, file))
    return replace(origin.spec, version="", path=str(folder))
