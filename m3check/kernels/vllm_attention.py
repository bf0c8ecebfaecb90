"""vLLM's kernels of latent attention and its indexer: from the few files of a wheel that have them, or from a checkout.

They are no part of MiniMax-M3, so they are fetched and kept apart from its kernels; where that cannot be, only their ops
are missing. In wheels are `xpu_mla_sparse.py` and, up to 0.29, `triton_fp8_mqa_logits.py`; the others come with checkouts
of the pull requests that add them.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from m3check.arch import Arch
from m3check.kernels import named
from m3check.kernels.locate import Source, locate
from m3check.kernels.project import VLLM_ATTENTION
from m3check.kernels.provider import Spec, cannot_compile
from m3check.types import Case, Evidence, Kernel, M3CheckError

FOLDER = "vllm/v1/attention/ops"
FILES = (
    "triton_mla_sparse.py",
    "triton_mla_sparse_kernel.py",
    "xpu_mla_sparse.py",
    "mqa_logits_triton.py",
    "triton_fp8_mqa_logits.py",
)


def source(spec: Spec, main: Source, offline: bool) -> Source | str:
    """The files beside MiniMax-M3's, or the sentence why there are none; what a wheel has is read from its RECORD."""
    for record in main.folder.glob("vllm-*.dist-info/RECORD"):
        if not any(name in record.read_text(encoding="utf-8") for name in VLLM_ATTENTION.wanted):
            return f"the wheel of vllm {main.version} has no {' and no '.join(VLLM_ATTENTION.wanted)}"
    try:
        return locate(spec, offline, VLLM_ATTENTION)
    except M3CheckError as error:
        return str(error)


def found(folder: Path) -> Mapping[str, tuple[named.Named, str]]:
    """op: its function and the stem of its file, for each op that the files of a folder have."""
    stems: dict[str, str] = {}
    for name in FILES:
        path = folder / FOLDER / name
        if path.is_file():
            stems = dict.fromkeys(_defined(path, os.stat(path).st_mtime_ns), path.stem) | stems
    return {
        op: next((function, stems[name]) for name, function in named.of(op).items() if name in stems)
        for op in named.OPS_WITH_NAMES
        if named.of(op).keys() & stems.keys()
    }


@functools.cache
def _defined(path: Path, changed: int) -> frozenset[str]:
    try:
        tree = ast.parse(path.read_bytes(), filename=str(path))
    except (OSError, SyntaxError, ValueError) as error:
        raise M3CheckError(f"cannot read {path}: {error}") from error
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def refusal(spec: Spec, main: Source, case: Case, arch: Arch, evidence: Evidence) -> str | None:
    """Why the case cannot run, as far as is known without fetching anything."""
    held = source(spec, main, offline=True)
    if isinstance(held, str):
        return None if spec.version else held  # not fetched yet: what it lacks is said when it is loaded
    ops = found(held.folder)
    if case.op not in ops:
        return _lacks(held, case.op)
    function, _ = ops[case.op]
    if function.vendor not in ("", arch.vendor) and evidence != "interpreted":
        return f"{function.name} is launched with options of {function.vendor}'s compiler, not for {arch.name}"
    sentence = function.refusal(case)
    if sentence:
        return f"{function.name} {sentence}"
    return None if function.decodes else cannot_compile(case, arch, evidence)


def _lacks(held: Source, op: str) -> str:
    return f"vllm {held.version} has no kernel for {op} ({' or '.join(named.of(op))} in {FOLDER})"


def put_in(
    kernels: dict[str, Kernel], missing: dict[str, str], spec: Spec, main: Source, arch: Arch, offline: bool
) -> dict[str, str]:
    """Load what there is; returns the hash of each file that was executed."""
    from m3check.kernels.standin import World

    held = source(spec, main, offline)
    if isinstance(held, str):
        missing |= dict.fromkeys(named.OPS_WITH_NAMES, held)
        return {}
    ops = found(held.folder)
    package = FOLDER.replace("/", ".")
    world = World(held.folder, arch, pdl=False, further=(f"{package}.",))
    for shell in ("vllm.v1", "vllm.v1.attention", package):
        world.add(shell)
    for op in named.OPS_WITH_NAMES:
        if op not in ops:
            missing[op] = _lacks(held, op)
            continue
        function, stem = ops[op]
        try:
            module = world.load(f"{package}.{stem}")
        except Exception as error:  # a file of a checkout may import what only a whole vLLM has
            missing[op] = f"{stem}.py of vllm {held.version} does not import: {type(error).__name__}: {error}"
            continue
        adapted = function.adapted(world.inside(getattr(module, function.name)))
        warm_up = function.warm_up_of(module, world.inside)
        kernels[op] = Kernel(spec.text, op, function.name, function.profile, adapted, warm_up=warm_up)
    return {
        f"sha256 {path.relative_to(held.folder)}": hashlib.sha256(path.read_bytes()).hexdigest()
        for path in world.executed.values()
    }
