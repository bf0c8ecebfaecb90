"""SGLang's other way through scoring: one pass over the keys that scores every block and attends to all of them.

A layer whose index head has values (`disable_index_value` off) runs these kernels; none of MiniMax-M3's does. Their scores
are held to the same reference, with the keys in the place of values, and their attention is block-sparse attention
on lists that name every visible block.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from m3check.kernels.sglang.calls import NO_SELECTION, SELECT_PREFILL, Calls
from m3check.kernels.sglang.launches import instead, not_launched
from m3check.kernels.sglang.views import halves, scales


class FusedCalls(Calls):
    """The same ops, scoring and dense attention by the fused kernels."""

    def _value(self, keys: Tensor) -> dict[str, Any]:
        return {"v_cache": keys, "disable_index_value": False}

    def sparse_attn(
        self,
        q: Tensor,
        kv_cache: Tensor,
        topk_idx: Tensor,
        block_table: Tensor,
        cu_seqlens_q: Tensor,
        seq_lens: Tensor,
        prefix_lens: Tensor,
        max_query_len: int,
        sm_scale: float,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> Tensor:
        """[T, Hq, D], query dtype; `topk_idx` names every visible block and is not read."""
        keys, values, table = halves(kv_cache, q.shape[-1], block_table)
        tensors = q, keys, table, cu_seqlens_q, seq_lens, prefix_lens
        told: dict[str, Any] = {"v_cache": values, "sm_scale": sm_scale, **scales(k_scale, v_scale)}
        with instead(self._prefill_index, {SELECT_PREFILL: not_launched}):
            out: Tensor = self._index(tensors, max_query_len, table.shape[1], **told)[0]
        return out

    def sparse_attn_decode(
        self,
        q: Tensor,
        kv_cache: Tensor,
        topk_idx: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        sm_scale: float,
        decode_query_len: int,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> Tensor:
        """[T, Hq, D], query dtype; `topk_idx` names every visible block and is not read."""
        keys, values, table = halves(kv_cache, q.shape[-1], block_table)
        told: dict[str, Any] = {"v_cache": values, "sm_scale": sm_scale, **scales(k_scale, v_scale)}
        with instead(self._decode_index, NO_SELECTION):
            out: Tensor = self._index_decode((q, keys, table, seq_lens), table.shape[1], decode_query_len, **told)[0]
        return out
