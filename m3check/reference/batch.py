"""What a mixed batch is to the kernels that run it, in plain Python: the metadata that production builds before a step.

Decoded requests lead: they are as long as the first one, which is no longer than the longest query that counts as a decode
(1 without draft tokens). All that follow are prefilled, whatever their length. Rows of the prefilled part count from 0.
"""

from __future__ import annotations

from collections.abc import Sequence

from m3check.types import BLOCK


def batch(query_lens: Sequence[int], kv_lens: Sequence[int], longest_decode: int) -> dict[str, list[int]]:
    """Counts (lists of one number), lengths and row starts of both parts; `longest_decode` 0 stands for 1.

    `prefill_pages` names each block of each prefilled request, request by request, as request · 2^32 + block.
    """
    first = query_lens[0]
    decodes = 0
    if first <= max(longest_decode, 1):
        while decodes < len(query_lens) and query_lens[decodes] == first:
            decodes += 1
    starts = [0]
    for length in query_lens[decodes:]:
        starts.append(starts[-1] + length)
    pages = [(r << 32) + b for r in range(decodes, len(kv_lens)) for b in range(-(-kv_lens[r] // BLOCK))]
    return {
        "num_decodes": [decodes],
        "num_decode_tokens": [decodes * first],
        "num_prefills": [len(query_lens) - decodes],
        "num_prefill_tokens": [starts[-1]],
        "decode_query_len": [first if decodes else 0],
        "decode_seq_lens": list(kv_lens[:decodes]),
        "prefill_seq_lens": list(kv_lens[decodes:]),
        "prefill_prefix_lens": [kv - q for q, kv in zip(query_lens[decodes:], kv_lens[decodes:], strict=True)],
        "prefill_cu_seqlens_q": starts,
        "prefill_pages": pages,
    }


NAMES = tuple(batch([1], [1], 1))
"""The entries, in order."""
