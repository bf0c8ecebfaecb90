"""sparse_pa_table_decode: sparse_pa_table for the last queries of each request."""

from __future__ import annotations

from torch import Tensor

from m3check.kernels.triton.profile import PROFILE
from m3check.kernels.triton.sparse_pa_table import launch

__all__ = ["PROFILE", "sparse_pa_table_decode"]


def sparse_pa_table_decode(
    topk_idx: Tensor, block_table: Tensor, seq_lens: Tensor, decode_query_len: int, block_page_stride: int
) -> tuple[Tensor, Tensor]:
    """(table [T, topk · 8] int32, context lengths [T] int32); a padded row has a context of 0.

    Raises ValueError where there is more than one head.
    """
    return launch(topk_idx, block_table, seq_lens, seq_lens, decode_query_len, block_page_stride, True)
