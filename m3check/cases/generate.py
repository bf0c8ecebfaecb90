"""A case's logical tensors, made from its id alone, the same bits on every machine.

Each tensor has its own stream, keyed by the id and the tensor's name. Words are made by numpy on the CPU; on a GPU only
the table look-up runs there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from m3check.cases import families
from m3check.cases.fills import FILLS, Draw, index_dtypes
from m3check.cases.ident import case_id
from m3check.cases.selections import SELECTIONS, visible_blocks
from m3check.cases.stream import Stream, key
from m3check.cases.validity import is_fp8, reads_main_cache
from m3check.types import OPS, Case, Inputs, M3CheckError

if TYPE_CHECKING:
    from torch import Tensor


def make_inputs(case: Case, device: torch.device | str = "cpu") -> Inputs:
    """The logical tensors that an op reads; shapes, dtypes and what stays None are told in `types.Inputs`.

    Lists may be ragged, rows dead, and scales distinct per token and head; sm_scale is head_dim ** -0.5.
    The same case has the same bits on every machine. Raises M3CheckError for a case that makes no sense.
    """
    family = families.of(case.op) if case.op in OPS else None
    if case.op not in OPS or case.fill not in FILLS or case.ids not in (*SELECTIONS, *(family.ids if family else ())):
        from m3check.cases.validity import validate

        validate(case)
        raise M3CheckError(f"no inputs for {case}")
    name = case_id(case)
    queries, tokens, heads, dim = case.total_queries, case.total_tokens, case.kv_heads, case.head_dim

    def draw(role: str, shape: tuple[int, ...], dtype: str) -> Tensor:
        return FILLS[case.fill].make(Draw(case, role, shape, dtype, device, Stream(f"{name}#{role}")))

    if family is not None:
        made: dict[str, Any] = {"sm_scale": dim**-0.5, **family.make(case, draw, device)}
        return Inputs(case, **made)
    tensors: dict[str, Any] = {}
    chain = bool(OPS[case.op].chain)
    if case.op == "index_topk":
        tensors["scores"] = _hide(draw("scores", (heads, queries, case.block_columns), "fp32"), case)
    if chain or case.op in ("index_score", "index_decode_score", "index_decode"):
        query_dtype, key_dtype = index_dtypes(case)
        tensors["idx_q"] = draw("idx_q", (queries, heads, dim), query_dtype)
        tensors["idx_k"] = draw("idx_k", (tokens, dim), key_dtype)
    if reads_main_cache(case.op):
        tensors["q"] = draw("q", (queries, case.heads, dim), case.dtype)
        tensors["k"] = draw("k", (tokens, heads, dim), case.cache_dtype)
        tensors["v"] = draw("v", (tokens, heads, dim), case.cache_dtype)
        if is_fp8(case.cache_dtype):
            tensors["k_scale"] = scale(case, name, "k", device)
            tensors["v_scale"] = scale(case, name, "v", device)
        if not chain:
            ids = SELECTIONS[case.ids](case, Stream(f"{name}#ids"))
            tensors["topk_idx"] = torch.from_numpy(ids).to(torch.int32).to(device)
    return Inputs(case, sm_scale=dim**-0.5, **tensors)


def _hide(scores: Tensor, case: Case) -> Tensor:
    """-inf in the cells of blocks that a query does not see."""
    visible = torch.from_numpy(visible_blocks(case)).to(scores.device)
    block = torch.arange(scores.shape[-1], device=scores.device)
    return scores.masked_fill_(block >= visible[:, None], float("-inf"))


_TOKEN_PRIMES = {"k": (611953, 263071), "v": (420241, 750019)}
"""What one token and one head further add: neighbours differ by a lot, and keys differ from values."""


def scale(case: Case, name: str, which: str, device: torch.device | str) -> Tensor | None:
    """Scales in fp32, none of them 1 or a power of two: k below 1 and v above for `scalar`, all distinct for `token`."""
    start = key(f"{name}#{which}_scale")
    if case.scales == "scalar":
        lowest = 512 if which == "k" else 1024  # 512/1024 … 1023/1024, and 1024/1024 … 2047/1024
        return torch.tensor((lowest + 1 + 2 * (start % (lowest // 2))) / 1024, dtype=torch.float32, device=device)
    if case.scales == "token":
        steps = 3 << 18  # odd multiples of 2^-20 from a half to two
        per_token, per_head = _TOKEN_PRIMES[which]
        token = torch.arange(case.total_tokens, device=device)[:, None]
        head = torch.arange(case.kv_heads, device=device)[None, :]
        step = (token * per_token + head * per_head + start % steps) % steps
        return ((1 << 19) + 1 + 2 * step).float() / float(1 << 20)
    return None
