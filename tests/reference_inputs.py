"""Small batches drawn by hypothesis, edges first, for the tests of the references."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from m3check.types import OPS, SPARSE, Case, Inputs

LENGTHS = (1, 127, 128, 129, 256, 257, 640, 1000, 1409, 2048)
ODD_SCORES = (float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, 1.0, 2e30)


@st.composite
def cases(draw, ops=tuple(SPARSE)) -> Case:
    """A case of up to three requests; decode batches may hold dead rows, prefill batches requests without queries."""
    op = draw(st.sampled_from(ops))
    requests = draw(st.integers(1, 3))
    if OPS[op].phase == "decode":
        query_lens = (draw(st.integers(1, 3)),) * requests
        kv_lens = tuple(draw(st.sampled_from((0, *LENGTHS))) for _ in range(requests))
    else:
        query_lens = tuple(draw(st.integers(0, 3)) for _ in range(requests))
        kv_lens = tuple(draw(st.sampled_from(LENGTHS)) + query_len for query_len in query_lens)
    return Case(
        op=op,
        query_lens=query_lens,
        kv_lens=kv_lens,
        kv_heads=draw(st.sampled_from((2, 1, 3))),
        gqa=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from((1, 3, 8))),
        topk=draw(st.integers(1, 7)),
        init_blocks=draw(st.sampled_from((0, 0, 1, 3))),
        local_blocks=draw(st.sampled_from((1, 0, 1, 3))),
        dtype=draw(st.sampled_from(("bf16", "fp16", "fp32"))),
        seed=draw(st.integers(0, 2**20)),
    )


def inputs_of(case: Case, nasty: bool = True) -> Inputs:
    """Gaussian queries and keys, some in small integers so that scores tie; `nasty` adds odd keys, scores and id lists."""
    generator = torch.Generator().manual_seed(case.seed)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[case.dtype]

    def gauss(*shape: int) -> torch.Tensor:
        numbers = torch.randn(shape, generator=generator)
        return (numbers.round() if case.seed % 2 else numbers).to(dtype)

    queries, tokens, heads, dims = case.total_queries, case.total_tokens, case.kv_heads, case.head_dim
    scores = torch.randn((heads, queries, case.block_columns), generator=generator).round()
    ids = torch.argsort(
        torch.rand((heads, queries, case.topk + 5), generator=generator)
    )  # distinct, many of them invisible
    idx_k = gauss(tokens, dims)
    if nasty:
        idx_k[torch.rand(tokens, generator=generator) < 0.1] = float("nan")
        idx_k[torch.rand(tokens, generator=generator) < 0.002] = float("inf")
        odd = torch.rand(scores.shape, generator=generator) < 0.4
        pick = torch.randint(len(ODD_SCORES), scores.shape, generator=generator)
        scores = torch.where(odd, torch.tensor(ODD_SCORES)[pick], scores)
        ids = ids.where(torch.rand(ids.shape, generator=generator) < 0.7, -1)
    return Inputs(
        case,
        sm_scale=dims**-0.5,
        idx_q=gauss(queries, heads, dims),
        idx_k=idx_k,
        scores=scores,
        q=gauss(queries, heads * case.gqa, dims),
        k=gauss(tokens, heads, dims),
        v=gauss(tokens, heads, dims),
        topk_idx=ids[..., : case.topk].int(),
    )
