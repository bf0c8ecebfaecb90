"""SGLang's MiniMax-M3 Triton kernels, installed, out of a published wheel or from a checkout: one adapter for all versions.

Only the kernel files are executed, each by its path and beside stand-ins for what they import (`modules`); its wrappers are
called through `calls` or `fused`, by the provider's name; what a version can do is read from its source. Facts: the SGLang
wheels 0.5.14 to 0.5.23.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util

from m3check.arch import Arch
from m3check.kernels.locate import Source, Sources, import_failure, locate
from m3check.kernels.project import SGLANG
from m3check.kernels.provider import Loaded, Spec, cannot_compile, with_chains
from m3check.kernels.sglang.reading import COMMON, FUSED, WAYS, Files, Reading, read
from m3check.kernels.sglang.refusals import refusal
from m3check.types import OPS, Case, Evidence, Kernel, M3CheckError, Profile

_sources = Sources(SGLANG)

prepare = _sources.prepare


def refuses(spec: Spec, case: Case, arch: Arch, evidence: Evidence) -> str | None:
    """Why the kernels of a spec cannot run a case, read from their source; None too while they are not fetched."""
    source = _sources.here(spec)
    if source is None:
        return cannot_compile(case, arch, evidence)
    found, files = read(source), WAYS[spec.provider]
    missing = _missing(source, found, files, arch)
    for op in OPS[case.op].chain or (case.op,):
        sentence = missing.get(op) or refusal(found, files, arch, evidence, op, case)
        if sentence:
            return sentence
    return None


def load(spec: Spec, arch: Arch, evidence: Evidence, offline: bool) -> Loaded:
    """Execute the kernel files of a version."""
    for library in ("torch", "triton"):
        if importlib.util.find_spec(library) is None:
            raise M3CheckError(f"SGLang's kernels need {library}, which is not installed here")
    from m3check.kernels.sglang.calls import Calls
    from m3check.kernels.sglang.fused import FusedCalls
    from m3check.kernels.sglang.modules import modules, presented

    source = locate(spec, offline, SGLANG)
    found, files = read(source), WAYS[spec.provider]
    world = modules(source.folder, found.tree, arch)
    loaded = {}
    with presented(arch):
        for stem in found.stems:
            name = f"{found.tree}/{stem}".replace("/", ".")
            try:
                loaded[stem] = world.load(name)
            except Exception as error:
                raise import_failure(source, SGLANG, name, error) from error
    calls = (FusedCalls if files is FUSED else Calls)(loaded)
    missing = _missing(source, found, files, arch)
    kernels = {
        op: Kernel(spec.text, op, files[op][1], _profile(found, files, op), world.inside(getattr(calls, op)))
        for op in files
        if op not in missing
    }
    all_kernels, all_missing = with_chains(kernels, missing)
    refused = functools.partial(refusal, found, files, arch, evidence)
    return Loaded(spec, all_kernels, all_missing, _description(source, found), source.warnings, refused)


def _missing(source: Source, found: Reading, files: Files, arch: Arch) -> dict[str, str]:
    """A sentence for each op, chains left out, that has no wrapper here."""
    missing = {
        op.name: f"m3check reads no {op.name} out of sglang" for op in OPS.values() if op.name not in files and not op.chain
    }
    for op, (stem, name) in files.items():
        if name not in found.parameters:
            missing[op] = f"sglang {source.version} has no {name} in {found.tree}/{stem}.py"
        elif op == "index_decode_cp" and arch.vendor != "amd":
            missing[op] = f"{op} is a piece of SGLang's path on AMD; on {arch.name} production does not use it"
    return missing


def _profile(found: Reading, files: Files, op: str) -> Profile:
    return Profile(
        id_order="ascending" if found.ascending else "score",
        tie_rule="smaller_id" if op == "index_decode_cp" else "any",
        dead_rows="nan",
        id_lists=frozenset({"full", "ascending"} if files is FUSED else {"full", "ascending", "short"}),
        odd_scores=frozenset({"nan"}),
        normaliser="lse",
        dequantise="folded",
        partials="query",
        bitwise=frozenset({"apart", "empty"}),
    )


# Words about it.


def _description(source: Source, found: Reading) -> dict[str, str]:
    return {
        "version": source.version,
        "from": source.origin,
        **{
            f"sha256 {stem}.py": hashlib.sha256((source.folder / found.tree / f"{stem}.py").read_bytes()).hexdigest()
            for stem in (COMMON, *found.stems)
        },
        "note": "production on NVIDIA selects decode's blocks with a CUDA kernel where topk <= 32; these are Triton's",
    }
