"""Our own indexer: batch metadata and the order of launches around any provider's five kernels.

Ids stand head-major in one persistent buffer, decoded rows first; scores likewise, so that a captured graph finds both at
the same address in every step.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from m3check.kernels.contract import SIGNATURES
from m3check.kernels.serving import Batch, Buffers, Figures, Layout, Tensors
from m3check.types import Kernel, blocks

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Decode:
    """What the decode kernels of one step read; every tensor is a view of memory that stays where it is."""

    seq_lens: Tensor
    block_table: Tensor
    decode_query_len: int
    max_decode_query_len: int
    max_seq_len: int


@dataclass(frozen=True)
class Prefill:
    """What the prefill kernels of one step read; rows count from the first prefilled one."""

    cu_seqlens_q: Tensor
    seq_lens: Tensor
    prefix_lens: Tensor
    block_table: Tensor
    page_table: Tensor
    """Pages of all blocks, request after request, int32."""
    max_query_len: int
    max_seq_len: int


@dataclass(frozen=True)
class Metadata:
    """One step of one cache group."""

    num_actual_tokens: int
    num_decodes: int
    num_decode_tokens: int
    num_prefills: int
    num_prefill_tokens: int
    decode: Decode | None
    prefill: Prefill | None


class Composed:
    """Host code around the kernels of a provider, by op."""

    layout: Layout = "head"

    def __init__(self, parts: Mapping[str, Kernel], figures: Figures, buffers: Buffers) -> None:
        import torch

        self._parts, self._figures, self._buffers = parts, figures, buffers
        scoring = (inspect.signature(parts[op].function) for op in ("index_score", "index_decode"))
        self.keeps_scores = all("score_out" in signature.parameters for signature in scoring)
        self._prefix = torch.zeros(figures.max_requests, dtype=torch.int32, device=figures.device)

    def decodes(self, batch: Batch) -> int:
        """Leading requests as long as the first, where that is no longer than a decode may be; read on the host."""
        lengths = (batch.query_starts_host[1:] - batch.query_starts_host[:-1]).tolist()
        if lengths[0] > self._figures.max_query_len:
            return 0
        return next((i for i, length in enumerate(lengths) if length != lengths[0]), len(lengths))

    def build(self, batch: Batch) -> tuple[Metadata, Metadata]:
        """Metadata for the index cache and for the main cache, without waiting for the device."""
        starts, count = batch.query_starts, batch.requests
        self._prefix[:count].copy_(batch.seq_lens - (starts[1:] - starts[:-1]))
        return self._of(batch, batch.index_table), self._of(batch, batch.main_table)

    def _of(self, batch: Batch, table: Tensor) -> Metadata:
        import torch

        decodes, count = self.decodes(batch), batch.requests
        rows = int(batch.query_starts_host[decodes])
        decode = prefill = None
        if decodes:
            decode = Decode(
                batch.seq_lens[:decodes],
                table[:decodes],
                rows // decodes,
                self._figures.max_query_len,
                batch.max_seq_len,
            )
        if count > decodes:
            lengths = batch.seq_lens_host[decodes:].tolist()
            pages = [table[decodes + i, : blocks(length)] for i, length in enumerate(lengths)]
            prefill = Prefill(
                batch.query_starts[decodes:] - rows,
                batch.seq_lens[decodes:],
                self._prefix[decodes:count],
                table[decodes:],
                torch.cat(pages),
                batch.max_query_len,
                batch.max_seq_len,
            )
        return Metadata(batch.tokens, decodes, rows, count - decodes, batch.tokens - rows, decode, prefill)

    def forward(self, metadata: tuple[Metadata, Metadata], tensors: Tensors) -> Sequence[Tensor | None]:
        """Select, then attend; ids and scores of decoded rows stand at [:, :nd] of their buffers, the others behind."""
        index, main = metadata
        tokens, rows = index.num_actual_tokens, index.num_decode_tokens
        idx_q, q, output = (_heads(t, tokens, self._figures.head_dim) for t in (tensors.idx_q, tensors.q, tensors.output))
        ids, scores = self._buffers.ids[:, :tokens], self._buffers.scores[:, :tokens]
        scales = {"k_scale": tensors.k_scale, "v_scale": tensors.v_scale}
        if index.decode:
            self._select("index_decode", ids[:, :rows], score_out=scores[:, :rows], idx_q=idx_q[:rows],
                         index_kv_cache=tensors.index_kv_cache, **_arguments(index.decode))  # fmt: skip
        if index.prefill:
            asked = {"idx_q": idx_q[rows:], "index_kv_cache": tensors.index_kv_cache, **_arguments(index.prefill)}
            score = self._call("index_score", score_out=scores[:, rows:], **asked)
            self._select("index_topk", ids[:, rows:], score=score, **_arguments(index.prefill))
        if main.decode:
            self._attend("sparse_attn_decode", output[:rows], q=q[:rows], kv_cache=tensors.kv_cache,
                         topk_idx=ids[:, :rows], **_arguments(main.decode), **scales)  # fmt: skip
        if main.prefill:
            self._attend("sparse_attn", output[rows:], q=q[rows:], kv_cache=tensors.kv_cache,
                         topk_idx=ids[:, rows:], **_arguments(main.prefill), **scales)  # fmt: skip
        return ids[:, :rows] if index.decode else None, ids[:, rows:] if index.prefill else None

    def _select(self, op: str, ids: Tensor, **arguments: Any) -> None:
        """Ids into their rows of the buffer; a kernel that takes no buffer has them copied."""
        _kept(ids, self._call(op, out=ids, **arguments))

    def _attend(self, op: str, output: Tensor, **arguments: Any) -> None:
        _kept(output, self._call(op, output=output, **arguments))

    def _call(self, op: str, **arguments: Any) -> Any:
        """The kernel with those of the arguments, and of the model's figures, that it takes."""
        figures, function = self._figures, self._parts[op].function
        arguments |= {"topk": figures.topk, "init_blocks": figures.init_blocks, "local_blocks": figures.local_blocks,
                      "num_kv_heads": figures.kv_heads, "sm_scale": figures.sm_scale}  # fmt: skip
        parameters = inspect.signature(function).parameters
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            wanted = {n for n in SIGNATURES[op][0] if n in parameters or n not in ("out", "score_out")}
        else:
            wanted = set(parameters)
        return function(**{name: value for name, value in arguments.items() if name in wanted})


@dataclass(frozen=True)
class ComposedMaker:
    """Makes a `Composed` of a provider's kernels."""

    parts: Mapping[str, Kernel]
    layout: Layout = "head"

    def __call__(self, figures: Figures, buffers: Buffers) -> Composed:
        """An implementation that keeps these buffers."""
        return Composed(self.parts, figures, buffers)


def _arguments(part: Decode | Prefill) -> dict[str, Any]:
    return {name: value for name, value in vars(part).items() if name != "page_table"}


def _heads(tensor: Tensor, tokens: int, dim: int) -> Tensor:
    """[max_tokens, heads · D] as [T, heads, D]."""
    cut: Tensor = tensor[:tokens].unflatten(1, (-1, dim))
    return cut


def _kept(buffer: Tensor, returned: Tensor | None) -> None:
    """Copy what a kernel returned where it is not the buffer itself."""
    if returned is not None and returned.untyped_storage().data_ptr() != buffer.untyped_storage().data_ptr():
        buffer.copy_(returned[:, : buffer.shape[1]] if returned.dtype == buffer.dtype and buffer.dim() == 3 else returned)
