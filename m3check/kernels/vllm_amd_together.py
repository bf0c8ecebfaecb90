"""Pieces of vLLM's path on AMD that are several functions, put together as its layers call them.

Context parallelism is called in each process of a group; here one process plays all of them in turn, and gathering is
putting their keys one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from m3check.kernels.calls import BrokenContract

if TYPE_CHECKING:
    from torch import Tensor

Parts = Mapping[str, Any]
"""The functions of a piece, by name."""

NO_TABLE: Mapping[str, Any] = {}


def _ranks_of(scores_of: Callable[[int, int], Tensor], exchange: Parts, heads: int, tokens: int, ranks: int, topk: int,
              out: Tensor | None, seq_lens: Tensor, table: Mapping[str, Any] = NO_TABLE, **how: int) -> Tensor:  # fmt: skip
    """Each rank's keys of its own blocks, then each rank's merge of the heads that it owns, as the model deals them out.

    `table`: what a merge is told that writes a table of pages, too.
    """
    import torch

    if out is None:
        out = torch.empty(heads, tokens, topk, dtype=torch.int32, device=seq_lens.device)
    gathered = []
    for rank in range(ranks):
        keys = torch.empty(heads, tokens, topk, dtype=torch.int64, device=seq_lens.device)
        exchange["local_topk_keys"](
            scores_of(rank, ranks), seq_lens, topk=topk, rank=rank, world=ranks, query_len=how["query_len"],
            global_blocks=how["global_blocks"], init_blocks=how["init_blocks"], local_blocks=how["local_blocks"], out=keys,
        )  # fmt: skip
        gathered.append(keys)
    together = torch.stack(gathered)
    share, replicas = (heads // ranks, 1) if heads >= ranks else (1, ranks // heads)
    for rank in range(ranks):
        own = slice(rank // replicas * share, rank // replicas * share + share)
        exchange["merge_topk_keys"](
            together[:, own], out[own, :tokens], seq_lens, query_len=how["query_len"], init_blocks=how["init_blocks"],
            local_blocks=how["local_blocks"], **table,
        )  # fmt: skip
    return out[:, :tokens]


def _in_place(result: Tensor, buffer: Tensor, function: str, parameter: str) -> Tensor:
    """The result, which a captured graph finds only where its buffer is."""
    if result.untyped_storage().data_ptr() != buffer.untyped_storage().data_ptr():
        raise BrokenContract(f"{function} did not write its result into the buffer that it was given as {parameter}")
    return result


def index_decode_cp(parts: Parts) -> Callable[..., Any]:
    """Scoring of each rank's blocks, then selection and merge."""
    import torch

    def play(
        idx_q: Tensor, index_kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor, max_seq_len: int, topk: int,
        init_blocks: int, local_blocks: int, num_kv_heads: int, decode_query_len: int, sm_scale: float, ranks: int,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        def scores_of(rank: int, world: int) -> Tensor:
            # The layer owns a buffer for its longest batch and context; the first rank's has not a cell to spare.
            rows, columns = (0, 0) if rank == 0 else (3, 5)
            local = -(-max_seq_len // (128 * world))
            buffer = torch.full((num_kv_heads, len(idx_q) + rows, local + columns), torch.nan, device=idx_q.device)
            scores: Tensor = parts["indexer_context_scores"](
                idx_q, index_kv_cache, block_table, seq_lens, max_seq_len, rank, world, decode_query_len, sm_scale, buffer
            )
            return _in_place(scores, buffer, "indexer_context_scores", "out")

        return _ranks_of(
            scores_of, parts, num_kv_heads, idx_q.shape[0], ranks, topk, out, seq_lens, query_len=decode_query_len,
            global_blocks=-(-max_seq_len // 128), init_blocks=init_blocks, local_blocks=local_blocks,
        )  # fmt: skip

    return play


def index_topk_cp(parts: Parts) -> Callable[..., Any]:
    """Selection and merge of given scores."""

    def play(
        score: Tensor, seq_lens: Tensor, max_seq_len: int, topk: int, init_blocks: int, local_blocks: int,
        decode_query_len: int, ranks: int, out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        return _merged(
            parts, score, seq_lens, max_seq_len, topk, init_blocks, local_blocks, decode_query_len, ranks, out, NO_TABLE
        )

    return play


def index_topk_cp_table(parts: Parts) -> Callable[..., Any]:
    """The same, each merge writing the table of its own ids."""

    def play(
        score: Tensor, seq_lens: Tensor, max_seq_len: int, topk: int, init_blocks: int, local_blocks: int,
        decode_query_len: int, ranks: int, attention_block_table: Tensor, sparse_block_table_out: Tensor,
        sparse_context_lens_out: Tensor, block_page_stride: int, out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        table = {
            "attention_block_table": attention_block_table,
            "sparse_block_table_out": sparse_block_table_out,
            "sparse_context_lens_out": sparse_context_lens_out,
            "block_page_stride": block_page_stride,
        }
        return _merged(
            parts, score, seq_lens, max_seq_len, topk, init_blocks, local_blocks, decode_query_len, ranks, out, table
        )

    return play


def _merged(
    parts: Parts, score: Tensor, seq_lens: Tensor, max_seq_len: int, topk: int, init_blocks: int, local_blocks: int,
    decode_query_len: int, ranks: int, out: Tensor | None, table: Mapping[str, Any],
) -> Tensor:  # fmt: skip
    return _ranks_of(
        lambda rank, world: score[..., rank::world], parts, score.shape[0], score.shape[1], ranks, topk, out, seq_lens,
        table, query_len=decode_query_len, global_blocks=-(-max_seq_len // 128), init_blocks=init_blocks,
        local_blocks=local_blocks,
    )  # fmt: skip


def page16_rebase(parts: Parts) -> Callable[..., Any]:
    """Slots and table of one step."""

    def play(slot_mapping: Tensor, block_table: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
        slots = parts["minimax_m3_rebase_slots_to_page16"](slot_mapping, block_size)
        rows, columns = block_table.shape
        buffer = block_table.new_full((rows + 1, columns + 3), -1)[:rows, :columns]
        table = parts["minimax_m3_rebase_block_table_to_page16"](block_table, out=buffer)
        return slots, _in_place(table, buffer, "minimax_m3_rebase_block_table_to_page16", "out")

    return play
