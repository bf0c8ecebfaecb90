"""Where a provider's kernel sources are, and how a mutant of them is loaded: in a private folder, never in place."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from m3check import kernels
from m3check.arch import Arch
from m3check.kernels import Loaded, Spec
from m3check.kernels.provider import with_chains
from m3check.mutants.mutant import Mutant
from m3check.types import OPS, Evidence, Kernel

TILES = frozenset({"tiles.py", "tuning.py", "profile.py", "__init__.py"})
"""Our files whose figures must not change a result: negative controls turn them, generic edits leave them alone."""


@dataclass(frozen=True)
class Sources:
    """The kernel files of one provider for one target."""

    spec: Spec
    name: str
    trees: Mapping[str, Path]
    """Folders of kernel files below a package's home, and where that home is."""
    files: tuple[str, ...]
    """Relative to the first tree that has them; empty for a provider whose sources are not edited, only wrapped."""

    def path(self, file: str) -> Path:
        """Where a file is."""
        return self.trees[self.tree(file)] / self.tree(file) / file

    def tree(self, file: str) -> str:
        """The tree that a file is of."""
        return next(tree for tree, home in self.trees.items() if (home / tree / file).is_file())

    def read(self, file: str) -> bytes:
        """One file's text."""
        return self.path(file).read_bytes()


def sources(spec: Spec, arch: Arch, offline: bool) -> Sources:
    """The files that a provider's kernels come from."""
    if spec.provider == "triton":
        root = Path(kernels.__file__).parent / "triton"
        files = tuple(sorted(path.name for path in root.glob("*.py") if path.name not in TILES))
        return Sources(spec, "triton", {"": root}, files)
    if spec.provider == "vllm":
        return _vllm(spec, arch, offline)
    return Sources(spec, spec.provider, {}, ())


def _vllm(spec: Spec, arch: Arch, offline: bool) -> Sources:
    """MiniMax-M3's files that production uses on the target, AMD's pieces among them, and those of latent attention."""
    from m3check.kernels import vllm, vllm_amd, vllm_attention
    from m3check.kernels.locate import TREE, locate

    source = locate(spec, offline)
    choices, missing = vllm.choose(source, arch)
    prefix = TREE.replace("/", ".") + "."
    files = {choice.module.removeprefix(prefix).replace(".", "/") for choice in choices.values()}
    pieces = [piece for op, piece in vllm_amd.PIECES.items() if op not in missing]
    files |= {f"amd/ops/{stem}" for piece in pieces for stem in piece.parts.values() if stem != vllm_amd.LIFTED}
    trees, stems = {TREE: source.folder}, set[str]()
    beside = vllm_attention.source(spec, source, offline)
    if not isinstance(beside, str):
        trees[vllm_attention.FOLDER] = beside.folder
        stems = {stem for _, stem in vllm_attention.found(beside.folder).values()}
    return Sources(spec, "vllm", trees, tuple(f"{stem}.py" for stem in (*sorted(files), *sorted(stems))))


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
    def unused(parent: str, names: Sequence[str]) -> list[str]:
        return [name for name in names if not name.endswith(".py") and not Path(parent, name).is_dir()]

    for tree, home in origin.trees.items():
        shutil.copytree(home / tree, folder / tree, ignore=unused)
    for file in {edit.file for edit in mutant.edits}:
        (folder / origin.tree(file) / file).write_bytes(edited(origin.read(file), mutant, file))
    return replace(origin.spec, version="", path=str(folder))
