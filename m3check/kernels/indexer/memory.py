"""The physical tensors of one call: what an implementation keeps from step to step, and what a step reads and writes.

They are made for a larger batch than the case, with poison in the rows of nobody, so that what must stay where it is can be
told from what moved.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from m3check.kernels.serving import Batch, Buffers, Figures, Layout, Tensors
from m3check.types import BLOCK, Inputs, Kernel, blocks

if TYPE_CHECKING:
    from torch import Tensor

    from m3check.kernels.indexer.batches import Rows
    from m3check.paging import Guard, Pages, Territory, World

SPARE_TOKENS, SPARE_REQUESTS = 5, 3
"""What the largest batch has more than the case."""


class Memory:
    """The physical tensors of one call."""

    def __init__(self, kernel: Kernel, inputs: Inputs, world: World) -> None:
        import torch

        from m3check import paging

        case = inputs.case
        assert inputs.idx_q is not None
        assert inputs.q is not None
        self.case, self.world, self.device = case, world, inputs.device
        self.max_tokens = case.total_queries + SPARE_TOKENS
        max_requests = len(case.kv_lens) + SPARE_REQUESTS
        self.max_seq_len = world.max_seq_len or max(case.context, 1)
        salted = replace(case, op=world.salt)
        self.pages = {
            name: paging.Pages.shuffled(salted, name, self.device, world) for name in ("index", "main")
        }  # two cache groups
        layout: Layout = kernel.function.layout  # type: ignore[attr-defined]
        self.ids, self.scores, self.output = self._buffers(layout, inputs)
        self.head_major = self.ids.view.transpose(0, 1) if layout == "token" else self.ids.view
        self.tensors = Tensors(
            self._padded(inputs.idx_q),
            paging.pack_index_cache(inputs, self.pages["index"], world.poison),
            self._padded(inputs.q),
            paging.pack_main_cache(inputs, self.pages["main"], kernel.profile.kv_layout, world.poison),
            paging.pack_scale(inputs.k_scale, case, self.pages["main"], world.poison),
            paging.pack_scale(inputs.v_scale, case, self.pages["main"], world.poison),
            self.output.view,
        )
        self.figures = Figures(
            case.kv_heads, case.heads, case.head_dim, case.topk, case.init_blocks, case.local_blocks, inputs.sm_scale,
            case.index_cache_dtype, case.cache_dtype, self.max_tokens, max_requests, self.max_seq_len,
            max(case.max_query_len, 1), self.device,
        )  # fmt: skip
        self.starts = torch.zeros(max_requests + 1, dtype=torch.int32, device=self.device)
        self.lengths = torch.zeros(max_requests, dtype=torch.int32, device=self.device)
        self.positions, self.slots = (torch.zeros(self.max_tokens, dtype=torch.int64, device=self.device) for _ in "ps")
        self.tables = {name: _persistent(pages, max_requests) for name, pages in self.pages.items()}

    @property
    def buffers(self) -> Buffers:
        """What an implementation is given to keep."""
        return Buffers(self.ids.view, self.scores.view)

    def _buffers(self, layout: Layout, inputs: Inputs) -> tuple[Guard, Guard, Guard]:
        import torch

        from m3check import paging

        case, tokens, rows = self.case, self.case.total_queries, self.max_tokens
        assert inputs.q is not None
        poison = paging.poison_value(torch.float32, self.world.poison)
        stale = paging.IMPOSSIBLE_ID if self.world.poison == "nan" else 0
        shape, dim = ([case.kv_heads, rows, case.topk], 1) if layout == "head" else ([rows, case.kv_heads, case.topk], 0)
        ids = paging.guarded("id buffer", shape, stale, torch.int32, self.device)
        ids.own(dim, tokens)
        columns = -(-max(1, blocks(self.max_seq_len)) // 16) * 16
        scores = paging.guarded("score buffer", [case.kv_heads, rows, columns], poison, torch.float32, self.device)
        scores.own(1, tokens)
        width = case.heads * case.head_dim
        output = paging.guarded("output", [rows, width], poison, inputs.q.dtype, self.device)
        output.own(0, tokens)
        return ids, scores, output

    def _padded(self, tensor: Tensor) -> Tensor:
        """[T, heads, D] as [max_tokens, heads · D], poison in the rows past T."""
        from m3check import paging

        poison = paging.poison_value(tensor.dtype, self.world.poison)
        flat = tensor.flatten(1)
        padded = paging.filled([self.max_tokens, flat.shape[1]], poison, tensor.dtype, tensor.device)
        words = paging.words(padded)
        words[: len(flat)] = paging.words(flat)
        return padded

    def filled(self, rows: Rows) -> Batch:
        """The persistent lengths and tables with a batch in them, and views of its part."""
        import torch

        count = len(rows.kv_lens)
        starts = [0]
        for length in rows.query_lens:
            starts.append(starts[-1] + length)
        starts_host, lengths_host = (torch.tensor(values, dtype=torch.int32) for values in (starts, rows.kv_lens))
        self.starts[: count + 1] = starts_host.to(self.device)
        self.lengths[:count] = lengths_host.to(self.device)
        for name, table in self.tables.items():
            pages = self.pages[name].table
            table[:count, : pages.shape[1]] = pages[list(rows.requests)]
        tokens, placed = starts[-1], rows.placed(self.pages["main"])
        for held, values in ((self.positions, placed[0]), (self.slots, placed[1])):
            held[:tokens] = torch.tensor(values, dtype=torch.int64, device=self.device)
        return Batch(
            self.starts[: count + 1], starts_host, self.lengths[:count], lengths_host,
            self.tables["index"][:count], self.tables["main"][:count], self.positions[:tokens], self.slots[:tokens],
            max(rows.query_lens), self.max_seq_len,
        )  # fmt: skip

    def inputs(self, metadata: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
        """What a step reads and must not write, by name; scores that metadata hold are written."""
        own = ((name, tensor) for name, tensor in vars(self.tensors).items() if name != "output" and tensor is not None)
        return [*own, *((name, tensor) for name, tensor in metadata if not tensor.is_floating_point())]

    def territories(self, metadata: Iterable[tuple[str, Tensor]]) -> tuple[Territory, ...]:
        """What the kernels may do with each tensor; of caches and scales they may read the pages of the requests."""
        from m3check.paging import Territory

        def owned(name: str, tensor: Tensor) -> Tensor | None:
            if name == "index_kv_cache":
                return self.pages["index"].readable(self.case)
            mask = self.pages["main"].readable(self.case)
            if name == "kv_cache":
                return mask
            if name in ("k_scale", "v_scale") and tensor.dim() == 2:
                return mask.repeat_interleave(BLOCK).expand(tensor.shape[0], -1)
            return None

        tokens = self.case.total_queries
        rows = {"idx_q", "q"}  # padding behind a batch's rows belongs to nobody
        read = [
            Territory(name, tensor[:tokens] if name in rows else tensor, owned(name, tensor))
            for name, tensor in self.inputs(metadata)
        ]
        written = (("id buffer", self.head_major[:, :tokens]), ("score buffer", self.scores.view[:, :tokens]),
                   ("output", self.output.view[:tokens]))  # fmt: skip
        return (*read, *(Territory(name, tensor, output=True) for name, tensor in written))


def _persistent(pages: Pages, requests: int) -> Tensor:
    """A block table for `requests` rows; those of nobody name the page that the last row's unused columns name.

    Rows begin at multiples of 16 bytes, as a server's, whose columns are many: what reads faster then does so here, too.
    """
    table = pages.table
    wide = table[-1:, -1:].expand(requests, -(-table.shape[1] // 4) * 4).clone()
    wide[: len(table), : table.shape[1]] = table
    return wide
