"""The pieces that vLLM's path on AMD adds to its kernels: tables for AITER's paged attention, context-parallel indexing.

Most are functions of one file and keep m3check's keywords; what is several is put together in `vllm_amd_together`.
"""

from __future__ import annotations

import ast
import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

from m3check.arch import Arch
from m3check.kernels import vllm_amd_together as together
from m3check.types import BLOCK, ODD_SCORES, Case, Profile

if TYPE_CHECKING:
    from m3check.kernels.standin import World


@dataclass(frozen=True)
class Piece:
    """One op's function, or those that it is put together from."""

    parts: Mapping[str, str]
    """function: its file in amd/ops; the first one gives the piece its parameters unless it is put together."""
    composed: Callable[[together.Parts], Callable[..., Any]] | None = None
    called: str = ""
    """What results name, where it is not all functions."""

    @property
    def name(self) -> str:
        """The functions as results name them."""
        return self.called or " + ".join(self.parts)


SLOTS, LAYER = "../../common/sparse_attention", "../indexer_context_parallel"
LIFTED = frozenset({SLOTS, LAYER})
"""Files that import much of vLLM: of them only what needs nothing but torch and other parts is taken, each by itself."""

_EXCHANGE = {"local_topk_keys": "indexer_cp_exchange", "merge_topk_keys": "indexer_cp_exchange"}

PIECES: Mapping[str, Piece] = {
    "sparse_pa_table": Piece({"minimax_m3_build_sparse_block_table_prefill": "sparse_pa"}),
    "sparse_pa_table_decode": Piece({"minimax_m3_build_sparse_block_table_decode": "sparse_pa"}),
    "index_decode_table": Piece({"minimax_m3_index_decode": "index_topk"}),
    "index_decode_cp": Piece(
        {
            "indexer_context_scores": "indexer_context_parallel",
            "check_context_score_inputs": "indexer_context_parallel",
            **_EXCHANGE,
            "all_gather": "indexer_cp_exchange",
            "_packed": LAYER,
            "IndexerCPDecode": LAYER,
        },
        together.index_decode_cp,
        "IndexerCPDecode",
    ),
    "index_insert": Piece({"minimax_m3_insert_index_cache": "sparse_pa"}),
    "page16_rebase": Piece(
        {"minimax_m3_rebase_block_table_to_page16": "sparse_pa", "minimax_m3_rebase_slots_to_page16": SLOTS},
        together.page16_rebase,
    ),
    "index_topk_cp": Piece(_EXCHANGE, together.index_topk_cp),
    "index_topk_cp_table": Piece(_EXCHANGE, together.index_topk_cp_table),
}

WRITES = "sparse_block_table_out"
"""The parameter without which a function of a piece that makes a table writes none."""

WRITERS: Mapping[str, str] = {"index_decode_table": "minimax_m3_index_decode", "index_topk_cp_table": "merge_topk_keys"}
"""op: the function that writes its table."""


def missing(op: str, ops: Path, arch: Arch, version: str) -> str | None:
    """Why a version has no such piece on a target, read from its files below amd/ops; None where it has."""
    if arch.vendor != "amd":
        return f"{op} is a piece of vLLM's path on AMD; on {arch.name} production does not use it"
    for name, stem in PIECES[op].parts.items():
        functions = _parameters(ops / f"{stem}.py")
        if name not in functions:
            return f"vllm {version} has no {name} in {os.path.normpath(f'amd/ops/{stem}.py')}"
        if WRITERS.get(op) == name and WRITES not in functions[name]:
            return f"vllm {version}: {name} takes no {WRITES}: it selects, and writes no table"
    return None


def refusal(op: str, case: Case, ops: Path) -> str | None:
    """Why a piece cannot run a case; None where it can."""
    (name, stem), *_ = PIECES[op].parts.items()
    if op == "index_decode_cp":
        if (case.dtype, case.cache_dtype, case.head_dim) != ("bf16", "bf16", 128):
            got = f"{case.dtype}, {case.cache_dtype} and head_dim {case.head_dim}"
            return f"{name} needs bf16 queries and keys of 128 channels, got {got}"
        if case.layout == "pool":
            return f"{name} needs an index cache without gaps, got layout=pool"
    strided = "block_page_stride" in _parameters(ops / f"{stem}.py").get(name, ())
    if op.startswith("sparse_pa_table") and case.layout == "pool" and not strided:
        return f"{name} takes no block_page_stride: in this version a block spans 8 page ids"
    return None


def profile(op: str) -> Profile:
    """What the pieces promise: the fused selector a smaller id among equals, the merge of ranks a larger one.

    Forced blocks are told by a score of 1e29 or 1e30, which infinite and huge scores outrank.
    """
    tie: Literal["smaller_id", "larger_id"] = "smaller_id" if op == "index_decode_table" else "larger_id"
    strides = frozenset({"apart"} if op == "index_insert" else ())  # which reads the stride of its channels
    return Profile(id_order="score", tie_rule=tie, odd_scores=ODD_SCORES - {"huge", "infinite"}, bitwise=strides)


def file_of(op: str) -> str:
    """The file, without its ending, that a piece's first function is in."""
    return next(iter(PIECES[op].parts.values()))


def load(op: str, world: World, package: str, ops: Path) -> Callable[..., Any]:
    """The function of a piece, its files executed among the stand-ins of `world`."""
    _stand_in(world)
    parts: dict[str, Any] = {}
    for name, stem in PIECES[op].parts.items():
        path = ops / f"{stem}.py"
        if stem in LIFTED:
            parts[name] = _lifted(path, name, together.held_to_buffers(parts))
        else:
            parts[name] = getattr(world.load(f"{package}.{stem}"), name)
    compose = PIECES[op].composed
    function: Callable[..., Any] = compose(parts) if compose else next(iter(parts.values()))
    return world.inside(function)


def _lifted(path: Path, name: str, others: together.Parts) -> Callable[..., Any]:
    """One function or class of a file, executed beside `others` without the rest of the file; its annotations stay text."""
    import __future__

    import math

    import torch
    import triton

    nodes = ast.parse(path.read_bytes()).body
    node = next(n for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == name)
    space: dict[str, Any] = {"torch": torch, "triton": triton, "math": math, "SPARSE_BLOCK_SIZE": BLOCK, **others}
    code = compile(ast.Module([node], []), str(path), "exec", __future__.annotations.compiler_flag)
    exec(code, space)
    function: Callable[..., Any] = space[name]
    return function


def _stand_in(world: World) -> None:
    """What the exchange of keys imports and one process does not use."""

    def no_group() -> None:
        raise RuntimeError("m3check plays all ranks in one process: there is no group")

    world.add("vllm.distributed")
    world.add("vllm.distributed.parallel_state", GroupCoordinator=object, get_tp_group=no_group)
    world.add("vllm._aiter_ops", rocm_aiter_ops=SimpleNamespace(get_aiter_allreduce=lambda: None))


@functools.cache
def _parameters(path: Path) -> Mapping[str, tuple[str, ...]]:
    """The functions of a file and their parameters, and its classes; none where there is no such file."""
    if not path.is_file():
        return {}
    found: dict[str, tuple[str, ...]] = {}
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = tuple(a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs))
        elif isinstance(node, ast.ClassDef):
            found[node.name] = ()
    return found
