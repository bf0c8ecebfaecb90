"""What the files of one version of SGLang say of themselves: which wrappers they have, and what those take."""

from __future__ import annotations

import ast
import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from m3check.kernels.locate import Source
from m3check.kernels.project import SGLANG
from m3check.types import DTYPES, M3CheckError

PREFILL_INDEX = ("prefill/flash_with_topk_idx", "flash_prefill_with_topk_index")
DECODE_INDEX = ("decode/flash_with_topk_idx", "flash_decode_with_topk_idx")

Files = Mapping[str, tuple[str, str]]
"""op: the file and the wrapper that compute it."""

_SCORED: Files = {
    "index_score": PREFILL_INDEX,
    "index_topk": PREFILL_INDEX,
    "index_decode_score": DECODE_INDEX,
    "index_decode": DECODE_INDEX,
}

FILES: Files = {
    **_SCORED,
    "sparse_attn": ("prefill/topk_sparse", "flash_prefill_with_gqa_share_sparse"),
    "sparse_attn_decode": ("decode/topk_sparse", "flash_decode_with_gqa_share_sparse"),
    "index_decode_cp": ("decode/indexer_cp", "score_local_blocks"),
}

FUSED: Files = {**_SCORED, "sparse_attn": PREFILL_INDEX, "sparse_attn_decode": DECODE_INDEX}
"""Where one pass over the keys scores and attends (`fused`)."""

WAYS: Mapping[str, Files] = {"sglang": FILES, "sglang_fused": FUSED}
"""By provider."""

LATER = frozenset({"decode/indexer_cp"})
"""Files that early versions lack."""

COMMON = "common/utils"
"""What the others share: which dtypes they take."""

FP8_CACHES = "SPARSE_KV_FP8_DTYPES"
"""The name in COMMON of the list of fp8 dtypes that a cache may have."""


@dataclass(frozen=True)
class Reading:
    """What one version's files say of themselves."""

    tree: str
    stems: tuple[str, ...]
    """The files that hold wrappers, without their ending."""
    parameters: Mapping[str, frozenset[str]]
    """Of each wrapper that is there."""
    caches: frozenset[str]
    """fp8 dtypes that attention takes as a cache, as words of a case."""
    fp8_index: bool
    """Whether scoring takes an fp8 index cache."""
    fp8_queries: bool
    """Whether queries may be fp8, of the dialect e4m3fn, where the cache is too."""
    ascending: bool
    """Whether selected ids are sorted before they are stored."""


def read(source: Source) -> Reading:
    """What the files of a version say of themselves."""
    tree = next(tree for tree in SGLANG.trees if (source.folder / tree / "prefill").is_dir())
    files = {stem: source.folder / tree / f"{stem}.py" for stem in [COMMON, *(stem for stem, _ in FILES.values())]}
    for stem, file in list(files.items()):
        if stem in LATER and not file.is_file():
            del files[stem]
        elif not file.is_file():
            raise M3CheckError(f"{file} is not there, so this sglang's kernels cannot be loaded")
    return _read(tree, tuple((file, os.stat(file).st_mtime_ns) for file in files.values()))


@functools.cache
def _read(tree: str, files: tuple[tuple[Path, int], ...]) -> Reading:
    trees: dict[str, ast.Module] = {}
    for file, _ in files:
        try:
            trees[f"{file.parent.name}/{file.stem}"] = ast.parse(file.read_bytes(), filename=str(file))
        except (OSError, SyntaxError, ValueError) as error:
            raise M3CheckError(f"cannot read {file}: {error}") from error
    parameters: dict[str, frozenset[str]] = {}
    for stem, name in FILES.values():
        for node in trees[stem].body if stem in trees else ():
            if isinstance(node, ast.FunctionDef) and node.name == name:
                parameters[name] = frozenset(a.arg for a in (*node.args.args, *node.args.kwonlyargs))
    used = {stem: {n.id for n in ast.walk(module) if isinstance(n, ast.Name)} for stem, module in trees.items()}
    torch_names = {attribute: word for word, attribute in DTYPES.items() if word.startswith("fp8")}
    return Reading(
        tree,
        tuple(stem for stem in trees if stem != COMMON),
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
