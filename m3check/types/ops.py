"""The ops, one line each, by family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Phase = Literal["prefill", "decode", "mixed"]


@dataclass(frozen=True)
class Op:
    """One mathematical operation (or a chain of them) that providers implement."""

    name: str
    phase: Phase
    outputs: tuple[str, ...]  # of "score" [H, T, K], "ids" [H, T, topk], "out" [T, Hq, D]
    summary: str
    chain: tuple[str, ...] = ()  # the ops that a chain runs, in order
    on_ids: str = ""  # the op whose reference judges further outputs on the kernel's own ids, where it gives ids
    family: str = "sparse"  # the ops that share inputs, fields of Case and calling conventions (CONTRIBUTING: an op family)


OPS: Mapping[str, Op] = {
    op.name: op
    for op in (
        Op("index_score", "prefill", ("score",), "max of q·k over each visible 128-token block"),
        Op("index_topk", "prefill", ("ids",), "the blocks each query attends to: forced init and local, then by score"),
        Op("index_decode_score", "decode", ("score",), "block scores of the last query_len tokens of each request"),
        Op("index_decode", "decode", ("ids",), "decode block scores and their selection"),
        Op("sparse_attn", "prefill", ("out",), "causal softmax attention over the listed blocks"),
        Op("sparse_attn_decode", "decode", ("out",), "the same for the last query_len tokens of each request"),
        Op(
            "prefill",
            "prefill",
            ("score", "ids", "out"),
            "score, select, attend",
            ("index_score", "index_topk", "sparse_attn"),
        ),
        Op("decode", "decode", ("ids", "out"), "score and select, attend", ("index_decode", "sparse_attn_decode")),
        Op("mqa_logits", "prefill", ("logits",), "fp8 indexer logits: Σ weight · relu(q·k) over heads", family="logits"),
        Op("paged_mqa_logits", "decode", ("logits",), "the same out of pages of keys, then scales", family="logits"),
        Op("mla_sparse", "prefill", ("out", "lse"), "attention to listed tokens of a latent cache", family="latent"),
        Op(
            "sparse_pa_table",
            "prefill",
            ("pages", "context"),
            "the 16-token pages of listed blocks, for a paged attention",
            family="amd",
        ),
        Op(
            "sparse_pa_table_decode",
            "decode",
            ("pages", "context"),
            "the same for the last query_len tokens of each request",
            family="amd",
        ),
        Op(
            "index_decode_table",
            "decode",
            ("ids", "pages", "context", "counter"),
            "index_decode that writes the pages as well",
            on_ids="sparse_pa_table_decode",
            family="amd",
        ),
        Op("index_decode_cp", "decode", ("ids",), "index_decode by several processes that share the blocks", family="amd"),
        Op("index_topk_cp", "decode", ("ids",), "selection by several processes: keys gathered and merged", family="amd"),
        Op(
            "index_topk_cp_table",
            "decode",
            ("ids", "pages", "context"),
            "index_topk_cp whose merge writes the pages as well",
            on_ids="sparse_pa_table_decode",
            family="amd",
        ),
        Op("index_insert", "prefill", ("index_keys",), "index keys written into their slots of a cache", family="amd"),
        Op("page16_rebase", "prefill", ("slots", "blocks"), "slots and page ids where a page has 16 tokens", family="amd"),
        Op(
            "indexer",
            "mixed",
            ("ids", "out"),
            "a mixed batch through one layer: metadata, decoded and prefilled rows in one id buffer, attention reading it",
            ("index_decode", "index_score", "index_topk", "sparse_attn_decode", "sparse_attn"),
            family="indexer",
        ),
        Op(
            "qknorm_rope_insert",
            "prefill",
            ("q", "q_codes", "k", "idx_q", "idx_k", "cached_k", "cached_v", "cached_idx_k"),
            "norm and rotate fresh queries and keys, insert keys and values into the caches",
            family="insert",
        ),
    )
}

SPARSE: Mapping[str, Op] = {name: op for name, op in OPS.items() if op.family == "sparse"}
"""The ops of block-sparse attention. What only makes sense of blocks, lists of blocks and chains goes over these."""
