"""Pieces of vLLM's path on AMD that are several functions, put together as its layers call them.

Context parallelism is called in each process of a group; here one process plays all of them in turn, and gathering is
putting their parts one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from m3check.kernels.calls import BrokenContract
from m3check.types import BLOCK

if TYPE_CHECKING:
    from torch import Tensor

Parts = Mapping[str, Any]
"""The functions of a piece, by name."""

NO_TABLE: Mapping[str, Any] = {}


def _in_place(result: Tensor, buffer: Tensor, function: str, parameter: str) -> Tensor:
    """The result, which a captured graph finds only where its buffer is."""
    if result.untyped_storage().data_ptr() != buffer.untyped_storage().data_ptr():
        raise BrokenContract(f"{function} did not write its result into the buffer that it was given as {parameter}")
    return result


def held_to_buffers(parts: Parts) -> Parts:
    """The parts as a layer gets them: what is given the layer's own buffer must use it."""
    name = "indexer_context_scores"
    if name not in parts:
        return parts

    def scores(*arguments: Any, out: Tensor) -> Tensor:
        return _in_place(parts[name](*arguments, out=out), out, name, "out")

    return {**parts, name: scores}


class Waiting(Exception):
    """A rank has come to a gathering that other ranks have not come to."""


class Group:
    """A rank's group, as its layer sees it: what was gathered so far, and an end where it was not yet."""

    def __init__(self, world_size: int, gathered: Sequence[Sequence[Tensor]]) -> None:
        self.world_size = world_size
        self._gathered = iter(gathered)

    def all_gather(self, tensor: Tensor, dim: int) -> Tensor:
        """The parts of all ranks, one after the other along `dim`; raises Waiting, with the rank's own part."""
        import torch

        for parts in self._gathered:
            return torch.cat(list(parts), dim)
        raise Waiting(tensor.clone())


def index_decode_cp(parts: Parts) -> Callable[..., Any]:
    """The layer's own class, an object of it for each rank. All ranks begin anew after each gathering."""
    import torch

    layer = parts["IndexerCPDecode"]

    def play(
        idx_q: Tensor, index_kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor, max_seq_len: int, topk: int,
        init_blocks: int, local_blocks: int, num_kv_heads: int, decode_query_len: int, sm_scale: float, ranks: int,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        tokens = len(idx_q)
        if out is None:
            out = torch.empty(num_kv_heads, tokens, topk, dtype=torch.int32, device=idx_q.device)
        layers = [
            layer(
                total_heads=num_kv_heads, rank=rank, world_size=ranks, max_tokens=tokens + (3 if rank else 0),
                max_seq_len=max_seq_len, topk=topk, init_blocks=init_blocks, local_blocks=local_blocks, group=None,
                device=idx_q.device, head_dim=idx_q.shape[2],
            )
            for rank in range(ranks)
        ]  # fmt: skip
        gathered: list[list[Tensor]] = []
        while tokens:  # the layer is not called without a decoded token
            brought = []
            for own in layers:
                own.group = Group(ranks, gathered)
                own._checked = not idx_q.is_cuda  # it refuses what is not on a GPU
                heads = slice(own.head_offset, own.head_offset + own.local_heads)
                try:
                    own(
                        idx_q[:, heads], index_kv_cache, block_table, seq_lens, decode_query_len, out[heads, :tokens],
                        scale=sm_scale,
                    )  # fmt: skip
                except Waiting as waiting:
                    brought.append(waiting.args[0])
            if not brought:
                break
            gathered.append(brought)
        return out[:, :tokens]

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
    """Each rank's keys of its own blocks, then each rank's merge of the heads that it owns, as the layer deals them out.

    `table`: what a merge is told that writes a table of pages, too.
    """
    import torch

    heads, tokens, _ = score.shape
    if out is None:
        out = torch.empty(heads, tokens, topk, dtype=torch.int32, device=score.device)
    forced = {"query_len": decode_query_len, "init_blocks": init_blocks, "local_blocks": local_blocks}
    gathered = []
    for rank in range(ranks):
        keys = torch.empty(heads, tokens, topk, dtype=torch.int64, device=score.device)
        parts["local_topk_keys"](
            score[..., rank::ranks], seq_lens, topk=topk, rank=rank, world=ranks, global_blocks=-(-max_seq_len // BLOCK),
            out=keys, **forced,
        )  # fmt: skip
        gathered.append(keys)
    together = torch.stack(gathered)
    share, replicas = (heads // ranks, 1) if heads >= ranks else (1, ranks // heads)
    for rank in range(ranks):
        own = slice(rank // replicas * share, rank // replicas * share + share)
        parts["merge_topk_keys"](together[:, own], out[own, :tokens], seq_lens, **forced, **table)
    return out[:, :tokens]


def page16_rebase(parts: Parts) -> Callable[..., Any]:
    """Slots and table of one step."""

    def play(slot_mapping: Tensor, block_table: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
        slots = parts["minimax_m3_rebase_slots_to_page16"](slot_mapping, block_size)
        rows, columns = block_table.shape
        buffer = block_table.new_full((rows + 1, columns + 3), -1)[:rows, :columns]
        table = parts["minimax_m3_rebase_block_table_to_page16"](block_table, out=buffer)
        return slots, _in_place(table, buffer, "minimax_m3_rebase_block_table_to_page16", "out")

    return play
