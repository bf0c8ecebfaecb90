"""Whose kernel sources are edited: a line of `EDITED` for each provider, with the function that finds its files.

That function says which files production uses on the target, what of them calls can reach, and how an edited copy is
loaded. A provider without a line is wrapped only.
"""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from m3check import kernels
from m3check.arch import Arch
from m3check.kernels import Spec
from m3check.mutants.mutant import Mutant
from m3check.mutants.reach import reached
from m3check.mutants.sources import Sources, edited

TILES = frozenset({"tiles.py", "tuning.py", "profile.py", "__init__.py"})
"""Our files whose figures must not change a result: negative controls turn them, generic edits leave them alone."""


def sources(spec: Spec, arch: Arch, offline: bool) -> Sources:
    """The files that a provider's kernels come from."""
    find = EDITED.get(spec.provider)
    return find(spec, arch, offline) if find else Sources(spec, spec.provider, {}, ())


def _ours(spec: Spec, arch: Arch, offline: bool) -> Sources:
    root = Path(kernels.__file__).parent / "triton"
    files = tuple(sorted(path.name for path in root.glob("*.py") if path.name not in TILES))
    return Sources(spec, "triton", {"": root}, files, put=_first_in_our_package)


def _vllm(spec: Spec, arch: Arch, offline: bool) -> Sources:
    """MiniMax-M3's files that production uses on the target, AMD's pieces among them, and those of latent attention."""
    from m3check.kernels import vllm, vllm_amd, vllm_attention
    from m3check.kernels.locate import TREE, locate

    source = locate(spec, offline)
    choices, missing = vllm.choose(source, arch)
    prefix = TREE.replace("/", ".") + "."
    files = {choice.module.removeprefix(prefix).replace(".", "/") for choice in choices.values()}
    pieces = [piece for op, piece in vllm_amd.PIECES.items() if op not in missing]
    files |= {f"amd/ops/{stem}" for piece in pieces for stem in piece.parts.values() if stem not in vllm_amd.LIFTED}
    trees, stems = {TREE: source.folder}, set[str]()
    beside = vllm_attention.source(spec, source, offline)
    if not isinstance(beside, str):
        trees[vllm_attention.FOLDER] = beside.folder
        stems = {stem for _, stem in vllm_attention.found(beside.folder).values()}
    return Sources(spec, "vllm", trees, tuple(f"{stem}.py" for stem in (*sorted(files), *sorted(stems))), put=_copied)


def _sglang(spec: Spec, arch: Arch, offline: bool) -> Sources:
    """The files of SGLang's M3 kernels and what they share, as far as the provider's calls reach into them."""
    from m3check.kernels.locate import locate
    from m3check.kernels.project import SGLANG
    from m3check.kernels.sglang.reading import WAYS, read

    source = locate(spec, offline, SGLANG)
    home = source.folder / (tree := read(source).tree)
    ways = WAYS[spec.provider]
    entries = {name for op, (_, name) in ways.items() if op != "index_decode_cp"}
    if "index_decode_cp" in ways and arch.vendor == "amd":
        entries |= {"score_local_blocks", "select_local_candidates", "merge_candidates"}
    texts = {f"{path.parent.name}/{path.name}": path.read_bytes() for path in sorted(home.glob("*/*.py"))}
    reach = reached(texts.values(), entries, _fixed_in_sglang(spec.provider == "sglang", arch))
    files = tuple(file for file, text in texts.items() if reach.has_some(text))
    return Sources(spec, spec.provider, {tree: source.folder}, files, reach, _copied)


def _fixed_in_sglang(score_only: bool, arch: Arch) -> Mapping[str, bool]:
    """Conditions of its files that hold, or do not, in every call that m3check makes, as `ast.unparse` writes them."""
    without = (
        "HAS_SINK", "sink is not None",  # of other models
        "HAS_HISPARSE_SLOTS", "hisparse_slots is not None", "HAS_LOC_MAPPING",  # of pools with a second table
        "use_gumbel_topk", "MASK_INIT", "MASK_LOCAL",  # constants of its launches
        "use_dense_main_attn", "_skip_block_topk", "SKIP_TRIVIAL_TOPK_SCORE",  # of a dense backend
        "use_jit_topk",  # a CUDA kernel
        "is_xpu()",
        "seqlens_cpu is not None", "sm_scale is None",
    )  # fmt: skip
    given = (
        "SCORE_TYPE == 'max'", "score_type == 'max'",
        "hisparse_slots is None", "cu_seqblocks_q is None",
        "page_size % block_size == 0", "PAGED_CONTIG",  # a page is a block
    )  # fmt: skip
    return {
        **dict.fromkeys(without, False),
        **dict.fromkeys(given, True),
        **dict.fromkeys(("disable_index_value", "DISABLE_INDEX_VALUE"), score_only),
        **dict.fromkeys(("v_cache is not None", "o is not None"), not score_only),
        **dict.fromkeys(("get_platform().is_sm90", "hopper", "paged", "PAGED"), arch.name == "sm90"),
        **dict.fromkeys(("is_gfx95_supported()", "SUB_K > 0"), arch.name == "gfx950"),
        "_ON_HIP": arch.vendor == "amd",
    }


def _first_in_our_package(origin: Sources, mutant: Mutant, folder: Path) -> Spec:
    """Edited files stand before those of m3check's own package of kernels."""
    for file in {edit.file for edit in mutant.edits}:
        (folder / file).write_bytes(edited(origin.read(file), mutant, file))
    package = importlib.import_module("m3check.kernels.triton")
    for name in [n for n in sys.modules if n.startswith("m3check.kernels.triton.")]:
        del sys.modules[name]
        vars(package).pop(name.rpartition(".")[2], None)
    package.__path__.insert(0, str(folder))
    importlib.invalidate_caches()
    return origin.spec


def _copied(origin: Sources, mutant: Mutant, folder: Path) -> Spec:
    """A copy of every tree, edited, loaded by its path."""

    def unused(parent: str, names: Sequence[str]) -> list[str]:
        return [name for name in names if not name.endswith(".py") and not Path(parent, name).is_dir()]

    for tree, home in origin.trees.items():
        shutil.copytree(home / tree, folder / tree, ignore=unused)
    for file in {edit.file for edit in mutant.edits}:
        (folder / origin.tree(file) / file).write_bytes(edited(origin.read(file), mutant, file))
    return replace(origin.spec, version="", path=str(folder))


EDITED: Mapping[str, Callable[[Spec, Arch, bool], Sources]] = {
    "triton": _ours,
    "vllm": _vllm,
    "sglang": _sglang,
    "sglang_fused": _sglang,
}
