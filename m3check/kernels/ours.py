"""m3check's own Triton kernels: `m3check.kernels.triton.<op>` defines a function named like the op."""

from __future__ import annotations

import importlib
import importlib.util

from m3check.arch import Arch
from m3check.kernels.contract import SIGNATURES, check_signature
from m3check.kernels.provider import Loaded, Spec, with_chains
from m3check.types import Case, Evidence, Kernel, M3CheckError, Profile

PACKAGE = "m3check.kernels.triton"


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
        name = f"{PACKAGE}.{op}"
        if importlib.util.find_spec(name) is None:
            missing[op] = f"m3check has no Triton kernel for {op} yet"
            continue
        module = importlib.import_module(name)
        function = getattr(module, op)
        check_signature(op, function, name)
        profile, warm_up = getattr(module, "PROFILE", Profile()), getattr(module, "warm_up", None)
        kernels[op] = Kernel(spec.text, op, op, profile, function, warm_up=warm_up)
    all_kernels, all_missing = with_chains(kernels, missing)
    tiles = importlib.import_module(f"{PACKAGE}.tiles").CHOICES if evidence == "interpreted" else ()
    return Loaded(spec, all_kernels, all_missing, tiles=tiles)


def refuses(spec: Spec, case: Case, arch: Arch, evidence: Evidence) -> str | None:
    """Nothing: they take every shape, and decode every fp8 dialect by themselves."""
    return None
