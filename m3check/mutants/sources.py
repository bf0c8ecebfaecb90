"""A provider's kernel sources, and how a mutant of them is loaded: from a private folder, never in place."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from m3check import kernels
from m3check.arch import Arch
from m3check.kernels import Loaded, Spec
from m3check.kernels.provider import with_chains
from m3check.mutants.mutant import Mutant
from m3check.mutants.reach import Reach
from m3check.types import OPS, Evidence, Kernel


@dataclass(frozen=True)
class Sources:
    """The kernel files of one provider for one target."""

    spec: Spec
    name: str
    trees: Mapping[str, Path]
    """Folders of kernel files below a package's home, and where that home is."""
    files: tuple[str, ...]
    """Relative to the first tree that has them; empty for a provider whose sources are not edited, only wrapped."""
    reach: Reach = field(default_factory=Reach)
    """What of these files the provider's calls run on the target."""
    put: Callable[[Sources, Mutant, Path], Spec] | None = None
    """Writes a mutant's edits into a private folder; gives the spec that loads them."""

    def path(self, file: str) -> Path:
        """Where a file is."""
        return self.trees[self.tree(file)] / self.tree(file) / file

    def tree(self, file: str) -> str:
        """The tree that a file is of."""
        return next(tree for tree, home in self.trees.items() if (home / tree / file).is_file())

    def read(self, file: str) -> bytes:
        """One file's text."""
        return self.path(file).read_bytes()


def load(origin: Sources, arch: Arch, evidence: Evidence, mutant: Mutant | None, folder: Path) -> Loaded:
    """The provider's kernels with a mutant's edits and wrapper; None: as they are. Raises what importing them raises."""
    spec = origin.spec
    if mutant is not None and mutant.edits:
        assert origin.put is not None, "edits are made of what `files` names"
        sys.dont_write_bytecode = True
        spec = origin.put(origin, mutant, folder)
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
