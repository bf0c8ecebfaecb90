"""SGLang's MiniMax-M3 Triton kernels, installed, out of a published wheel or from a checkout: one adapter for all versions.

Only the kernel files are executed, each by its path and beside stand-ins for what they import (`modules`); its wrappers are
called through `calls`; what a version can do is read from its source. Facts: the SGLang wheels 0.5.14 to 0.5.23.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from m3check.arch import Arch
from m3check.kernels.locate import Source, Sources, import_failure, locate
from m3check.kernels.project import SGLANG
from m3check.kernels.provider import Loaded, Spec, cannot_compile, index_dtypes, with_chains
from m3check.types import DTYPES, OPS, Case, Evidence, Kernel, M3CheckError, Profile

FILES: Mapping[str, tuple[str, str]] = {  # op: the file and the wrapper that compute it
    "index_score": ("prefill/flash_with_topk_idx", "flash_prefill_with_topk_index"),
    "index_topk": ("prefill/flash_with_topk_idx", "flash_prefill_with_topk_index"),
    "index_decode_score": ("decode/flash_with_topk_idx", "flash_decode_with_topk_idx"),
    "index_decode": ("decode/flash_with_topk_idx", "flash_decode_with_topk_idx"),
    "sparse_attn": ("prefill/topk_sparse", "flash_prefill_with_gqa_share_sparse"),
    "sparse_attn_decode": ("decode/topk_sparse", "flash_decode_with_gqa_share_sparse"),
}

COMMON = "common/utils"
"""What the others share: which dtypes they take."""

FP8_CACHES = "SPARSE_KV_FP8_DTYPES"
"""The name in COMMON of the list of fp8 dtypes that a cache may have."""


@dataclass(frozen=True)
class Reading:
    """What one version's files say of themselves."""

    tree: str
    parameters: Mapping[str, frozenset[str]]
    """Of the wrapper of each op that is there."""
    caches: frozenset[str]
    """fp8 dtypes that attention takes as a cache, as words of a case."""
    fp8_index: bool
    """Whether scoring takes an fp8 index cache."""
    fp8_queries: bool
    """Whether queries may be fp8, of the dialect e4m3fn, where the cache is too."""
    ascending: bool
    """Whether selected ids are sorted before they are stored."""


_sources = Sources(SGLANG)

prepare = _sources.prepare


def refuses(spec: Spec, case: Case, arch: Arch, evidence: Evidence) -> str | None:
    """Why the kernels of a spec cannot run a case, read from their source; None too while they are not fetched."""
    source = _sources.here(spec)
    if source is None:
        return cannot_compile(case, arch, evidence)
    found = read(source)
    missing = _missing(source, found)
    for op in OPS[case.op].chain or (case.op,):
        sentence = missing.get(op) or _refusal(found, arch, evidence, op, case)
        if sentence:
            return sentence
    return None


def load(spec: Spec, arch: Arch, evidence: Evidence, offline: bool) -> Loaded:
    """Execute the kernel files of a version."""
    for library in ("torch", "triton"):
        if importlib.util.find_spec(library) is None:
            raise M3CheckError(f"SGLang's kernels need {library}, which is not installed here")
    from m3check.kernels.sglang.calls import Calls
    from m3check.kernels.sglang.modules import modules, presented

    source = locate(spec, offline, SGLANG)
    found = read(source)
    world = modules(source.folder, found.tree, arch)
    loaded = []
    with presented(arch):
        for stem in dict.fromkeys(stem for stem, _ in FILES.values()):
            name = f"{found.tree}/{stem}".replace("/", ".")
            try:
                loaded.append(world.load(name))
            except Exception as error:
                raise import_failure(source, SGLANG, name, error) from error
    calls = Calls(*loaded)
    missing = _missing(source, found)
    kernels = {
        op: Kernel(spec.text, op, FILES[op][1], _profile(found), world.inside(getattr(calls, op)))
        for op in FILES
        if op not in missing
    }
    all_kernels, all_missing = with_chains(kernels, missing)
    refusal = functools.partial(_refusal, found, arch, evidence)
    return Loaded(spec, all_kernels, all_missing, _description(source, found), source.warnings, refusal)


def read(source: Source) -> Reading:
    """What the files of a version say of themselves."""
    tree = next(tree for tree in SGLANG.trees if (source.folder / tree / "prefill").is_dir())
    files = [source.folder / tree / f"{stem}.py" for stem in dict.fromkeys([COMMON, *(stem for stem, _ in FILES.values())])]
    for file in files:
        if not file.is_file():
            raise M3CheckError(f"{file} is not there, so this sglang's kernels cannot be loaded")
    return _read(tree, tuple((file, os.stat(file).st_mtime_ns) for file in files))


@functools.cache
def _read(tree: str, files: tuple[tuple[Path, int], ...]) -> Reading:
    trees: dict[str, ast.Module] = {}
    for file, _ in files:
        try:
            trees[f"{file.parent.name}/{file.stem}"] = ast.parse(file.read_bytes(), filename=str(file))
        except (OSError, SyntaxError, ValueError) as error:
            raise M3CheckError(f"cannot read {file}: {error}") from error
    parameters: dict[str, frozenset[str]] = {}
    for op, (stem, name) in FILES.items():
        for node in trees[stem].body:
            if isinstance(node, ast.FunctionDef) and node.name == name:
                parameters[op] = frozenset(a.arg for a in (*node.args.args, *node.args.kwonlyargs))
    used = {stem: {n.id for n in ast.walk(module) if isinstance(n, ast.Name)} for stem, module in trees.items()}
    torch_names = {attribute: word for word, attribute in DTYPES.items() if word.startswith("fp8")}
    return Reading(
        tree,
        parameters,
        caches=frozenset(torch_names[name] for name in _listed(trees[COMMON]) if name in torch_names),
        fp8_index="check_sparse_kv_fp8" in used["prefill/flash_with_topk_idx"],
        fp8_queries="sparse_out_dtype" in used["prefill/flash_with_topk_idx"],
        ascending="_sort_ids_ascending" in used["prefill/flash_with_topk_idx"],
    )


def _listed(common: ast.Module) -> set[str]:
    """The names of torch dtypes in the list of fp8 caches."""
    return {
        node.attr
        for statement in common.body
        if isinstance(statement, ast.Assign) and any(getattr(t, "id", "") == FP8_CACHES for t in statement.targets)
        for node in ast.walk(statement.value)
        if isinstance(node, ast.Attribute)
    }


def _missing(source: Source, found: Reading) -> dict[str, str]:
    """A sentence for each op, chains left out, that has no wrapper here."""
    no_adapter = {op.name: f"m3check reads no {op.name} out of sglang" for op in OPS.values() if op.name not in FILES}
    return {op: sentence for op, sentence in no_adapter.items() if not OPS[op].chain} | {
        op: f"sglang {source.version} has no {name} in {found.tree}/{stem}.py"
        for op, (stem, name) in FILES.items()
        if op not in found.parameters
    }


def _profile(found: Reading) -> Profile:
    return Profile(
        id_order="ascending" if found.ascending else "score",
        dead_rows="nan",
        id_lists=frozenset({"full", "ascending", "short"}),
        odd_scores=frozenset({"nan"}),
        normaliser="lse",
        dequantise="folded",
        partials="query",
        bitwise=frozenset({"apart", "empty"}),
    )


def _refusal(found: Reading, arch: Arch, evidence: Evidence, op: str, case: Case) -> str | None:
    name = FILES[op][1]
    if op in ("index_score", "index_topk") and case.head_dim > 256:
        return f"{name} takes a head_dim of at most 256, got {case.head_dim}"
    if op == "index_topk" and case.init_blocks + case.local_blocks > case.topk:
        forced = f"{case.init_blocks} + {case.local_blocks}"
        return f"{name} takes no more forced blocks than topk, got {forced} of {case.topk}"
    if op == "sparse_attn" and case.gqa > 128:
        return f"{name} takes at most 128 query heads for a KV head, got {case.gqa}"
    if op.startswith("sparse_attn"):
        if case.scales == "token":
            return f"{name} takes one k_scale and one v_scale, none for each token"
        if case.scales != "none" and "k_scale" not in found.parameters[op]:
            return f"{name} takes no k_scale and v_scale, so it cannot read a scaled cache"
    if op == "index_topk":
        return cannot_compile(case, arch, evidence)
    return _dtypes(found, op, case) or cannot_compile(case, arch, evidence)


def _dtypes(found: Reading, op: str, case: Case) -> str | None:
    """Queries and cache of dtypes that a wrapper refuses."""
    name = FILES[op][1]
    index = op.startswith("index")
    queries, cache = index_dtypes(case) if index else (case.dtype, case.cache_dtype)
    plain = ("bf16", "fp16")
    if queries.startswith("fp8"):
        if not index:
            return f"{name} rounds weights to fp8 where queries are fp8, which is another sum than the contract's"
        if queries == cache == "fp8_e4m3fn" and found.fp8_queries:
            return None
        wanted = "bf16, fp16 or (with such a cache) fp8_e4m3fn" if found.fp8_queries else "bf16 or fp16"
        return f"{name} takes queries of {wanted}, got {queries} with a cache of {cache}"
    if queries not in plain:
        return f"{name} takes queries of bf16 or fp16, got {queries}"
    if cache == queries or (cache in found.caches and (found.fp8_index or not index)):
        return None
    fp8 = f", or of {', '.join(sorted(found.caches))}" if found.fp8_index or not index else ""
    return f"{name} takes a cache of the queries' dtype{fp8}; got {queries} and {cache}"


# Words about it.


def _description(source: Source, found: Reading) -> dict[str, str]:
    stems = dict.fromkeys([COMMON, *(stem for stem, _ in FILES.values())])
    return {
        "version": source.version,
        "from": source.origin,
        **{
            f"sha256 {stem}.py": hashlib.sha256((source.folder / found.tree / f"{stem}.py").read_bytes()).hexdigest()
            for stem in stems
        },
        "note": "production on NVIDIA selects decode's blocks with a CUDA kernel where topk <= 32; these are Triton's",
    }
