"""vLLM's MiniMax-M3 Triton kernels, installed, out of a published wheel or from a checkout: one adapter for every version.

Only the kernel files are executed, each by its path and beside stand-ins for what they import; what a version can do is
read from its source (`reading`). Facts: the vLLM wheels 0.24.0 to 0.33.0.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from m3check.arch import Arch
from m3check.kernels import named, reading, vllm_amd, vllm_attention, vllm_insert, vllm_layer
from m3check.kernels.contract import SIGNATURES
from m3check.kernels.fmha_sm100 import production
from m3check.kernels.locate import TREE, Source, Sources, import_failure, locate
from m3check.kernels.project import VLLM
from m3check.kernels.provider import Loaded, Spec, cannot_compile, index_dtypes, with_chains
from m3check.kernels.reading import PREFIX, Reading
from m3check.types import ODD_SCORES, OPS, Case, Evidence, Kernel, M3CheckError, Profile

FILES: Mapping[str, str] = {  # op: the file that defines it, in common/ops and amd/ops alike
    "index_score": "index_topk",
    "index_topk": "index_topk",
    "index_decode_score": "index_topk",
    "index_decode": "index_topk",
    "sparse_attn": "sparse_attn",
    "sparse_attn_decode": "sparse_attn",
}

COMMON_ON_AMD = frozenset({"sparse_attn_decode"})
"""amd/ops/sparse_attn.py re-exports the common one."""

ID_LISTS: Mapping[str, frozenset[str]] = {  # which id lists attention bears, by how it reads ids
    "leading": frozenset({"full", "ascending"}),
    "counted": frozenset({"full", "ascending", "short"}),
    "tested": frozenset({"full", "ascending", "short", "future"}),
}
"""No version promises `holes`: the best of them read min(topk, visible) slots, and a hole may push an id behind those."""


@dataclass(frozen=True)
class Choice:
    """What production runs for one op on one target."""

    module: str
    reading: Reading


_sources = Sources(VLLM)

prepare = _sources.prepare


def refuses(spec: Spec, case: Case, arch: Arch, evidence: Evidence) -> str | None:
    """Why the kernels of a spec cannot run a case, read from their source; None too while they are not fetched."""
    source = _sources.here(spec)
    if source is None:
        return cannot_compile(case, arch, evidence)
    if case.op in named.OPS_WITH_NAMES:
        return vllm_attention.refusal(spec, source, case, arch, evidence)
    choices, missing = choose(source, arch)
    paired = production.there(source.folder, source.version, arch, evidence)
    if OPS[case.op].phase == "mixed" and (sentence := vllm_layer.missing(source.folder)):
        return sentence
    for op in OPS[case.op].chain or (case.op,):
        if paired and production.takes(op, case):
            continue
        if op in missing:
            return missing[op]
        if case.scales != "none" and op.startswith("sparse_attn") and "k_scale" not in choices[op].reading.parameters:
            return f"{choices[op].reading.function} takes no k_scale and v_scale, so it cannot read a scaled cache"
        sentence = _refusal(source, choices, arch, evidence, None, op, case)
        if sentence:
            return sentence
    return None


def suits(spec: Spec, invariant: str, case: Case, arch: Arch, evidence: Evidence) -> bool:
    """Whether an invariant should rather be shown on a case: decode held against prefill where one of both is MSA's."""
    source = _sources.here(spec)
    if invariant != "same_as_prefill" or source is None:
        return False
    return production.there(source.folder, source.version, arch, evidence) and production.telling(case)


def load(spec: Spec, arch: Arch, evidence: Evidence, offline: bool) -> Loaded:
    """Execute the kernel files that production uses on `arch`."""
    for library in ("torch", "triton"):
        if importlib.util.find_spec(library) is None:
            raise M3CheckError(f"vLLM's kernels need {library}, which is not installed here")
    from m3check.kernels.standin import World

    source = locate(spec, offline)
    choices, missing = choose(source, arch)
    world = World(source.folder, arch, pdl=arch.pdl and (evidence != "interpreted" or _dependent_launch_runs()))
    kernels = {}
    for op, choice in choices.items():
        try:
            function = getattr(world.load(choice.module), choice.reading.function)
        except Exception as error:
            raise import_failure(source, VLLM, choice.module, error) from error
        unknown = {name: None for name in choice.reading.extra if name not in SIGNATURES[op][0]}
        kernels[op] = Kernel(
            spec.text, op, choice.reading.function, _profile(op, choice, arch), world.inside(function, **unknown)
        )
    for op in vllm_amd.PIECES.keys() - missing.keys():
        package = f"{TREE.replace('/', '.')}.amd.ops"
        try:
            function = vllm_amd.load(op, world, package, source.folder / TREE / "amd/ops")
        except Exception as error:
            raise import_failure(source, VLLM, f"{package}.{vllm_amd.file_of(op)}", error) from error
        kernels[op] = Kernel(spec.text, op, vllm_amd.PIECES[op].name, vllm_amd.profile(op), function)
    if evidence == "device" and vllm_insert.OP not in missing:
        kernels[vllm_insert.OP] = vllm_insert.kernel(spec.text, source.folder)
    all_kernels, all_missing = with_chains(kernels, missing)
    vllm_layer.put_in(all_kernels, all_missing, source.folder, arch, world.pdl)
    hashes = vllm_attention.put_in(all_kernels, all_missing, spec, source, arch, offline)
    loaded = Loaded(
        spec,
        all_kernels,
        all_missing,
        _description(source, choices, arch) | hashes,
        source.warnings,
        functools.partial(_refusal, source, choices, arch, evidence, kernels.get(vllm_insert.OP)),
        world.dependent_launch if arch.pdl else None,
    )
    paired = production.there(source.folder, source.version, arch, evidence)
    return production.with_msa(loaded, source.folder) if paired else loaded


def _dependent_launch_runs() -> bool:
    """Whether the interpreter takes PDL calls: as published it raises on them, repaired they are plain no-ops."""
    from triton.language.extra import cuda

    try:
        cuda.gdc_wait()
    except Exception:
        return False
    return True


# What production runs.


def choose(source: Source, arch: Arch) -> tuple[dict[str, Choice], dict[str, str]]:
    """For each op the function that production calls on a target, or the sentence why there is none."""
    choices: dict[str, Choice] = {}
    missing: dict[str, str] = {}
    for op, stem in FILES.items():
        amd = (
            arch.vendor == "amd" and op not in COMMON_ON_AMD and (source.folder / TREE / "amd/ops" / f"{stem}.py").is_file()
        )
        branch = "amd" if amd else "common"
        path = source.folder / TREE / branch / "ops" / f"{stem}.py"
        if not path.is_file():
            raise M3CheckError(f"{path} is not there, so this vLLM's {op} cannot be loaded")
        ops = _read(path, os.stat(path).st_mtime_ns)
        if op in ops:
            choices[op] = Choice(f"{TREE.replace('/', '.')}.{branch}.ops.{stem}", ops[op])
            continue
        where = f"{branch}/ops/{stem}.py" + (f", which production runs on {arch.name}" if amd else "")
        missing[op] = f"vllm {source.version} has no {PREFIX}{op} in {where}"
    sentence = vllm_insert.missing(source.folder)
    if sentence:
        missing[vllm_insert.OP] = sentence
    for op in vllm_amd.PIECES:
        sentence = vllm_amd.missing(op, source.folder / TREE / "amd/ops", arch, source.version)
        if sentence:
            missing[op] = sentence
    return choices, missing


@functools.cache
def _read(path: Path, changed: int) -> Mapping[str, Reading]:
    return reading.read_file(path)


def _profile(op: str, choice: Choice, arch: Arch) -> Profile:
    found = choice.reading
    selector = "amd.ops" in choice.module and op == "index_decode" and "completion_counter" in found.parameters
    return Profile(
        kv_layout=found.kv_layout or "packed",
        id_order="score",
        tie_rule="smaller_id" if selector else "any",
        dead_rows="nan",
        id_lists=ID_LISTS[found.id_rule],
        odd_scores=ODD_SCORES if selector else frozenset({"nan"}),
        normaliser="lse",
        dequantise="rounded",
        partials="query",
        bitwise=frozenset() if "amd.ops" in choice.module else frozenset({"apart", "empty"}),
    )


def _refusal(
    source: Source,
    choices: Mapping[str, Choice],
    arch: Arch,
    evidence: Evidence,
    insert: Kernel | None,
    op: str,
    case: Case,
) -> str | None:
    if op == vllm_insert.OP:
        layout = choices["sparse_attn"].reading.kv_layout or "packed"
        return vllm_insert.refusal(case, arch, evidence, insert, layout)
    if op in named.OPS_WITH_NAMES:
        return cannot_compile(case, arch, evidence)
    if op in vllm_amd.PIECES:
        return vllm_amd.refusal(op, case, source.folder / TREE / "amd/ops") or cannot_compile(case, arch, evidence)
    if OPS[case.op].phase == "mixed" and (sentence := vllm_layer.refusal(arch, case)):
        return sentence
    if op not in choices:
        return f"vllm {source.version} has no {op} that m3check knows of"
    found = choices[op].reading
    scores = op in ("index_score", "index_decode_score", "index_decode")
    if scores and case.head_dim & (case.head_dim - 1):
        return f"{found.function} needs a head_dim that is a power of two, got {case.head_dim}"
    if op.startswith("index_decode") and case.kv_heads & (case.kv_heads - 1):
        return f"{found.function} needs a number of index heads that is a power of two, got {case.kv_heads}"
    if scores:
        sentence = _mixed(found, case)
        if sentence:
            return sentence
    elif op != "index_topk" and not case.cache_dtype.startswith("fp8") and case.cache_dtype != case.dtype:
        return f"{found.function} multiplies {case.dtype} queries with a {case.dtype} or fp8 cache, got {case.cache_dtype}"
    return cannot_compile(case, arch, evidence)


def _mixed(found: Reading, case: Case) -> str | None:
    """Index queries and keys of different dtypes: only fp8 beside bf16, and only where the kernel widens it."""
    queries, keys = index_dtypes(case)
    if queries == keys:
        return None
    plain = [dtype for dtype in (queries, keys) if not dtype.startswith("fp8")]
    if found.mixes_fp8 and plain in (["bf16"], []):
        return None
    wanted = "the same dtype, or one fp8 and one bf16" if found.mixes_fp8 else "the same dtype"
    return f"{found.function} needs queries and keys of {wanted}, got {queries} and {keys}"


# Words about it.


def _description(source: Source, choices: Mapping[str, Choice], arch: Arch) -> dict[str, str]:
    import hashlib

    modules = sorted({choice.module for choice in choices.values()})
    files = [source.folder.joinpath(*module.split(".")).with_suffix(".py") for module in modules]
    return {
        "version": source.version,
        "from": source.origin,
        **{
            f"sha256 {file.relative_to(source.folder / TREE).as_posix()}": hashlib.sha256(file.read_bytes()).hexdigest()
            for file in files
        },
        **({"note": _family_100()} if arch.name in ("sm100", "sm103") else {}),
    }


def _family_100() -> str:
    return (
        "on this target production runs fmha_sm100 and CuteDSL kernels for topk 16; these are the Triton ones. An "
        "installed vLLM on such a GPU (--kernels vllm) gives both as production does"
    )
