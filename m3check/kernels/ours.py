"""m3check's own Triton kernels: `m3check.kernels.triton.<op>` defines a function named like the op."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

from m3check.arch import Arch
from m3check.kernels.contract import SIGNATURES, check_signature
from m3check.kernels.provider import Loaded, Spec, with_chains
from m3check.types import BLOCK, OPS, Case, Evidence, Kernel, M3CheckError, Profile

PACKAGE = "m3check.kernels.triton"
FOLDER = Path(__file__).parent / "triton"


def prepare(spec: Spec, offline: bool) -> tuple[str, ...]:
    """See that Triton is there, without importing it."""
    for library in ("torch", "triton"):
        if importlib.util.find_spec(library) is None:
            raise M3CheckError(f"the provider triton needs {library}, which is not installed here")
    return ()


def load(spec: Spec, arch: Arch, evidence: Evidence, offline: bool) -> Loaded:
    """Import the kernels, a file an op; a file's PROFILE, where it has one, says what it promises beyond the defaults."""
    prepare(spec, offline)
    kernels: dict[str, Kernel] = {}
    missing: dict[str, str] = {}
    for op in SIGNATURES:
        sentence = _missing(op)
        if sentence is not None:
            missing[op] = sentence
            continue
        name = f"{PACKAGE}.{op}"
        module = importlib.import_module(name)
        function = getattr(module, op)
        check_signature(op, function, name)
        profile, warm_up = getattr(module, "PROFILE", Profile()), getattr(module, "warm_up", None)
        kernels[op] = Kernel(spec.text, op, op, profile, function, warm_up=warm_up)
    all_kernels, all_missing = with_chains(kernels, missing)
    tiles = importlib.import_module(f"{PACKAGE}.tiles").CHOICES if evidence == "interpreted" else ()
    return Loaded(spec, all_kernels, all_missing, tiles=tiles)


def refuses(spec: Spec, case: Case, arch: Arch, evidence: Evidence) -> str | None:
    """That there is no such kernel; those that there are take every shape, and decode every fp8 dialect by themselves."""
    return None if OPS[case.op].chain else _missing(case.op)


def suits(spec: Spec, invariant: str, case: Case, arch: Arch, evidence: Evidence) -> bool:
    """Whether an invariant should rather be shown on a case: parts of a selection where the last one fills every slot."""
    last = case.topk == case.local_blocks and not case.init_blocks and case.context % (16 * BLOCK) == 0
    return invariant == "tiles" and case.op == "index_topk" and last


def _missing(op: str) -> str | None:
    """Why there is no kernel of an op; None where its file is there."""
    if (FOLDER / f"{op}.py").is_file():
        return None
    if OPS[op].family == "amd":
        return f"m3check has no kernel of its own for {op}, a piece of vLLM's path on AMD: --kernels vllm has it there"
    return f"m3check has no kernel of its own for {op}"
