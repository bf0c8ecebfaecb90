"""`index_score` by fmha_sm100's OnlyScore: a dense causal pass over the paged index keys that keeps each tile's maximum.

Called as vLLM's MSA indexer calls it: one planned launch over flat page lists, into a token-major buffer of 8,192 tiles;
cells that no tile of the plan reaches hold -inf.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from m3check.kernels.calls import BrokenContract
from m3check.kernels.fmha_sm100 import data
from m3check.kernels.fmha_sm100.interface import Interface
from m3check.types import BLOCK, Case

if TYPE_CHECKING:
    from torch import Tensor

NAME = "fmha_sm100 OnlyScore"

TILES = 8192
"""Columns of production's score buffer: 1,048,576 tokens."""


def adapter(interface: Interface) -> Any:
    """The op's function."""

    def index_score(
        idx_q: Tensor,
        index_kv_cache: Tensor,
        block_table: Tensor,
        cu_seqlens_q: Tensor,
        seq_lens: Tensor,
        prefix_lens: Tensor,
    ) -> Tensor:
        scores = unified(idx_q)
        if idx_q.shape[0]:
            lengths = cu_seqlens_q, seq_lens, prefix_lens
            score_into(interface, scores, idx_q, index_kv_cache, block_table, lengths)
        return scores.transpose(0, 1)

    return index_score


def unified(rows: Tensor) -> Tensor:
    """A score buffer [T, H, TILES] fp32 for rows [T, H, …] as the metadata builder leaves it: -inf everywhere."""
    import torch

    return torch.full((*rows.shape[:2], TILES), float("-inf"), device=rows.device)


def score_into(
    interface: Interface,
    scores: Tensor,
    idx_q: Tensor,
    index_kv_cache: Tensor,
    block_table: Tensor,
    lengths: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Plan and run OnlyScore; lengths are read on the host, as the builder reads them."""
    assert interface.plan is not None
    assert interface.run is not None
    cu_seqlens_q, seq_lens, prefix_lens = lengths
    heads, dim = idx_q.shape[1:]
    query_lens, kv_lens = cu_seqlens_q.diff().cpu(), seq_lens.cpu()
    plan = interface.plan(
        query_lens,
        kv_lens,
        heads,
        num_kv_heads=1,
        qo_offset=prefix_lens.cpu(),
        page_size=BLOCK,
        output_maxscore=True,
        causal=True,
        num_kv_splits=1,
    )
    fault = data.plan_fault(plan, query_lens.tolist(), kv_lens.tolist(), heads)
    if fault is not None:
        raise BrokenContract(fault)
    plan["max_k_tiles"] = TILES
    keys = index_kv_cache.unsqueeze(1)  # one head of keys: [pages, 1, 128, D]
    interface.run(
        idx_q,
        keys,
        keys,
        plan,
        kv_indices=flat_pages(block_table, seq_lens),
        output_o=False,
        output_maxscore=True,
        sm_scale=dim**-0.5,
        max_score=scores,
    )


def flat_pages(block_table: Tensor, seq_lens: Tensor) -> Tensor:
    """The pages of all requests one after the other, [Σ blocks] int32."""
    import torch

    column = torch.arange(block_table.shape[1], device=block_table.device)
    owned = column < ((seq_lens + BLOCK - 1) // BLOCK)[:, None]
    return block_table[owned]


def refusal(case: Case, dtypes: tuple[str, str]) -> str | None:
    """Why OnlyScore cannot run a case whose index queries and keys have these dtypes."""
    return indexed(NAME, case, dtypes)


def indexed(name: str, case: Case, dtypes: tuple[str, str]) -> str | None:
    """What both scoring kernels ask of their operands."""
    if case.head_dim != BLOCK:
        return f"{name} needs head_dim 128, got {case.head_dim}"
    if dtypes[0] != dtypes[1] or dtypes[0] not in ("bf16", "fp8_e4m3fn"):
        return f"{name} multiplies bf16 or fp8_e4m3fn index queries with keys of the same dtype, got {' and '.join(dtypes)}"
    return room(name, case)


def room(name: str, case: Case) -> str | None:
    """Why a context does not fit into production's score buffer."""
    if case.block_columns > TILES:
        return (
            f"{name} has production's buffer of {TILES} tiles, {TILES * BLOCK:,} tokens; this context has {case.context:,}"
        )
    return None
