"""How the kernels of block-sparse attention are called: their keywords, the physical tensors, and what must come back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from m3check.kernels.calls.family import BrokenContract, Calls, Physical, Taken
from m3check.types import BLOCK, OPS, Case, Inputs, Kernel

if TYPE_CHECKING:
    from torch import Tensor

    from m3check.paging import Guard, Pages, World

PARAMETERS: Mapping[str, str] = {
    "idx_q": "[T, H, D] query dtype: index queries, one head for each KV head",
    "index_kv_cache": "[pages, 128, D] cache dtype: index keys, shared by all index heads",
    "block_table": "[R, columns] int32: page of each logical block; past the last one, pages not to be read",
    "cu_seqlens_q": "[R + 1] int32: first query row of each request, then T",
    "seq_lens": "[R] int32: visible tokens of each request, its queries included; 0 is a padded row (decode)",
    "prefix_lens": "[R] int32: tokens before the first query: seq_lens - query lengths",
    "max_query_len": "int: longest query length of the batch",
    "max_seq_len": "int: at least the longest visible length",
    "num_kv_heads": "int: KV heads, also the index heads",
    "topk": "int: ids of each row",
    "init_blocks": "int: the first blocks that are always taken",
    "local_blocks": "int: the last visible blocks that are always taken, the query's own included",
    "decode_query_len": "int: query tokens of every request of a decode batch",
    "max_decode_query_len": "int: at least decode_query_len; the graph was captured for it",
    "score": "[H, T, K] fp32, any strides: block scores; cells of invisible blocks are undefined",
    "q": "[T, Hq, D] query dtype, any strides: attention queries",
    "kv_cache": "[pages, Hkv, 128, 2D] cache dtype, any strides: keys in the first D channels, values in the others",
    "topk_idx": "[H, T, topk] int32, any strides: logical block ids, -1 for an unused slot",
    "sm_scale": "float: the logits are q·k times this",
    "k_scale": "None, [1] or [Hkv, pages * 128] fp32: what an fp8 key is multiplied by",
    "v_scale": "likewise for values",
    "out": "[H, >= T, topk] int32: where to write the ids (optional)",
    "score_out": "[H, T, >= K] fp32, any strides: where to write the scores (optional)",
    "output": "[T, Hq, D], any strides: where to write the attention output",
}

SIGNATURES: Mapping[str, tuple[tuple[str, ...], str]] = {  # op: (parameters, what comes back)
    "index_score": (
        ("idx_q", "index_kv_cache", "block_table", "cu_seqlens_q", "seq_lens", "prefix_lens", "max_query_len",
         "max_seq_len", "num_kv_heads"),
        "[H, T, >= K] fp32; cells of blocks that a query does not see are -inf or left alone",
    ),
    "index_topk": (
        ("score", "cu_seqlens_q", "prefix_lens", "max_query_len", "topk", "init_blocks", "local_blocks", "out"),
        "[H, T, topk] int32, -1 in unused slots",
    ),
    "index_decode_score": (
        ("idx_q", "index_kv_cache", "block_table", "seq_lens", "max_seq_len", "init_blocks", "local_blocks", "num_kv_heads",
         "decode_query_len", "max_decode_query_len", "score_out"),
        "[H, T, >= K] fp32; forced cells hold 1e30 (init) or 1e29 (local)",
    ),
    "index_decode": (
        ("idx_q", "index_kv_cache", "block_table", "seq_lens", "max_seq_len", "topk", "init_blocks", "local_blocks",
         "num_kv_heads", "decode_query_len", "max_decode_query_len", "out", "score_out"),
        "[H, T, topk] int32, -1 in unused slots",
    ),
    "sparse_attn": (
        ("q", "kv_cache", "topk_idx", "block_table", "cu_seqlens_q", "seq_lens", "prefix_lens", "max_query_len",
         "num_kv_heads", "sm_scale", "output", "k_scale", "v_scale"),
        "None, or [T, Hq, D]",
    ),
    "sparse_attn_decode": (
        ("q", "kv_cache", "topk_idx", "block_table", "seq_lens", "num_kv_heads", "sm_scale", "output", "decode_query_len",
         "k_scale", "v_scale"),
        "None, or [T, Hq, D]",
    ),
}  # fmt: skip

_OPTIONAL = frozenset(
    {"out", "score_out", "output", "k_scale", "v_scale", "num_kv_heads", "seq_lens", "max_query_len", "max_seq_len",
     "max_decode_query_len"}
)  # fmt: skip

RESULT_IN: Mapping[str, str] = {"score": "score_out", "ids": "out", "out": "output"}
"""The buffer that a caller reads an output from, where it gave one."""

_CHANNELLED = frozenset({"idx_q", "index_kv_cache", "q", "kv_cache", "topk_idx", "score", *RESULT_IN.values()})

_TOKEN_DIMENSION: Mapping[str, int] = {
    "idx_q": 0, "q": 0, "output": 0, "topk_idx": 1, "score": 1, "out": 1, "score_out": 1,
}  # fmt: skip

_FRESH = frozenset({"idx_q", "score", "topk_idx"})
"""Index queries, block scores, selected ids."""


def physical(
    kernel: Kernel, inputs: Inputs, world: World, accepted: frozenset[str], upstream: Mapping[str, Tensor]
) -> Physical:
    """The tensors of one call, its caches paged and its scores as a kernel upstream left them."""
    from m3check import paging

    op = kernel.op
    reads_index = "index_kv_cache" in SIGNATURES[op][0]
    salted = replace(inputs.case, op=world.salt)
    if world.layout:
        inputs = replace(inputs, case=replace(inputs.case, layout=world.layout))
    case = inputs.case
    first = paging.far_page(case, reads_index) if world.far else 0
    pages = paging.Pages.shuffled(salted, "index" if reads_index else "main", inputs.device, world, first)
    query_len = max(case.query_lens, default=1)  # a decode batch of no requests still has one
    starts = [request.query_start for request in case.requests()] + [case.total_queries]

    arguments: dict[str, Any] = {
        "block_table": pages.table,
        "cu_seqlens_q": paging.lengths(starts, inputs.device),
        "seq_lens": paging.lengths(case.kv_lens, inputs.device),
        "prefix_lens": paging.lengths([request.prefix for request in case.requests()], inputs.device),
        "max_query_len": query_len,
        "max_seq_len": world.max_seq_len or max(case.context, 1),
        "num_kv_heads": case.kv_heads,
        "topk": case.topk,
        "init_blocks": case.init_blocks,
        "local_blocks": case.local_blocks,
        "decode_query_len": query_len,
        "max_decode_query_len": max(world.max_query_len or case.max_query_len, query_len),
        "sm_scale": inputs.sm_scale,
    }
    if reads_index:
        arguments["idx_q"] = _owned_copy(inputs.idx_q)
        arguments["index_kv_cache"] = paging.pack_index_cache(inputs, pages, world.poison)
    if op == "index_topk":
        arguments["score"] = upstream["score"] if "score" in upstream else _physical_scores(inputs, world)
    if "q" in SIGNATURES[op][0]:
        arguments["q"] = _queries(inputs, world)
        arguments["kv_cache"] = paging.pack_main_cache(inputs, pages, kernel.profile.kv_layout, world.poison)
        arguments["topk_idx"] = upstream["ids"] if "ids" in upstream else _owned_copy(inputs.topk_idx)
        arguments["k_scale"] = paging.pack_scale(inputs.k_scale, case, pages, world.poison)
        arguments["v_scale"] = paging.pack_scale(inputs.v_scale, case, pages, world.poison)
    return Physical(
        arguments,
        lambda wanted: _buffers(inputs, wanted, world),
        lambda name, tensor: _readable(name, tensor, pages, case),
        lambda name, tensor: _touched(name, tensor, pages),
    )


def _touched(name: str, tensor: Tensor, pages: Pages) -> Tensor | None:
    """The part of a vast tensor that is in use; None where all of it is."""
    if not pages.first:
        return None
    if name in ("index_kv_cache", "kv_cache"):
        return tensor[pages.first :]
    if name in ("k_scale", "v_scale") and tensor.dim() == 2:
        return tensor[:, pages.first * BLOCK :]
    return None


def _logical(kernel: Kernel, name: str, result: Any, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    """Check a result's shape and dtype; copies of its logical cells, and of the score columns past them."""
    import torch

    case = inputs.case
    wanted: tuple[tuple[int, ...], tuple[torch.dtype, ...]] = {
        "score": ((case.kv_heads, case.total_queries, case.block_columns), (torch.float32,)),
        "ids": ((case.kv_heads, case.total_queries, case.topk), (torch.int32, torch.int64)),
        "out": ((case.total_queries, case.heads, case.head_dim), (inputs.q.dtype,) if inputs.q is not None else ()),
    }[name]
    shape, dtypes = wanted
    if not isinstance(result, torch.Tensor):
        raise BrokenContract(f"{kernel.name} returned {type(result).__name__}, wanted a tensor {list(shape)}")
    fits = result.dim() == len(shape) and result.shape[:-1] == shape[:-1]
    fits = fits and (result.shape[-1] >= shape[-1] if name == "score" else result.shape[-1] == shape[-1])
    if name == "ids" and result.dim() == 3:  # rows past T belong to somebody else
        fits = result.shape[0] == shape[0] and result.shape[1] >= shape[1] and result.shape[2] == shape[2]
    if not fits:
        raise BrokenContract(f"{kernel.name} gave {name} of shape {list(result.shape)}, wanted {list(shape)}")
    if result.dtype not in dtypes:
        raise BrokenContract(f"{kernel.name} gave {name} as {result.dtype}, wanted {dtypes[0]}")
    beyond = None
    if name == "score":
        beyond = result[..., shape[-1] :].detach().clone()
        result = result[..., : shape[-1]]
    if name == "ids":
        result = result[:, : shape[1]]
    return result.detach().clone(), beyond


def _buffers(inputs: Inputs, accepted: frozenset[str], world: World) -> dict[str, Guard]:
    """The buffers that a kernel writes into, by keyword, the one that holds its result first."""
    import torch

    from m3check import paging

    case, device, strided = inputs.case, inputs.device, inputs.case.layout == "pool"
    unwritten = paging.poison_value(torch.float32, world.poison)
    buffers: dict[str, Guard] = {}
    if "output" in accepted:
        assert inputs.q is not None
        shape = [case.total_queries, case.heads, case.head_dim]
        buffers["output"] = paging.guarded("output", shape, unwritten, inputs.q.dtype, device, strided=strided)
    if "out" in accepted:
        shape = [case.kv_heads, case.total_queries, case.topk]
        stale = paging.IMPOSSIBLE_ID if world.poison == "nan" else 0
        spare = paging.SPARE_ROWS if strided else 0
        buffers["out"] = paging.guarded("out", shape, stale, torch.int32, device, strided=strided, spare=spare)
    if "score_out" in accepted:
        shape = [case.kv_heads, case.total_queries, -(-case.block_columns // 16) * 16]
        buffers["score_out"] = paging.guarded("score_out", shape, unwritten, torch.float32, device, strided=strided)
    return buffers


def _queries(inputs: Inputs, world: World) -> Tensor:
    """Attention queries; in a pool layout they are a slice of a fused QKV row, as a model would have them."""
    from m3check import paging

    q, case = inputs.q, inputs.case
    assert q is not None
    if case.layout != "pool":
        return q.clone()
    shape = [case.total_queries, case.heads + 2 * case.kv_heads, case.head_dim]
    fused = paging.filled(shape, paging.poison_value(q.dtype, world.poison), q.dtype, q.device)
    fused[:, : case.heads] = q
    return fused[:, : case.heads]


def _owned_copy(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.clone()


def _physical_scores(inputs: Inputs, world: World) -> Tensor:
    """Scores [H, T, K] with 16-divisible rows; cells of invisible blocks hold poison, which a kernel must not read."""
    import torch

    from m3check import paging

    scores, case = inputs.scores, inputs.case
    assert scores is not None
    columns = max(16, -(-case.block_columns // 16) * 16)
    poison = paging.poison_value(torch.float32, world.poison)
    wide = torch.full((*scores.shape[:2], columns), poison, dtype=torch.float32, device=scores.device)
    wide[..., : case.block_columns] = scores
    block = torch.arange(case.block_columns, device=scores.device)
    for request in case.requests():
        for i in range(request.query_len):
            row = wide[:, request.query_start + i, : case.block_columns]
            row[:, block >= request.visible_blocks(i)] = poison
    return wide


def _readable(name: str, tensor: Tensor, pages: Pages, case: Case) -> Tensor | None:
    """Of caches, the pages that a request owns.

    Whole pages, since kernels load a page whole and hide its dead slots; whole rows of a block table, though following a
    column past a request's last block leads to a page that nobody owns.
    """
    if name in ("index_kv_cache", "kv_cache"):
        return pages.readable(case)
    if name in ("k_scale", "v_scale") and tensor.dim() == 2:
        return pages.readable(case).repeat_interleave(BLOCK).expand(tensor.shape[0], -1)
    return None


def take(kernel: Kernel, result: Any, inputs: Inputs, buffers: Mapping[str, Guard]) -> Taken:
    """The result in logical form, and the scores that a selection was given a buffer for."""
    output = OPS[kernel.op].outputs[0]
    cells, beyond = _logical(kernel, output, result, inputs)
    taken = Taken({output: cells}, {} if beyond is None else {output: beyond})
    buffer = buffers.get(RESULT_IN[output])
    if buffer is not None and result.untyped_storage().data_ptr() != buffer.view.untyped_storage().data_ptr():
        taken.given[output], _ = _logical(kernel, output, buffer.view, inputs)
    if output == "ids" and "score_out" in buffers:
        taken.outputs["score"], _ = _logical(kernel, "score", buffers["score_out"].view, inputs)
    return taken


CALLS = Calls(
    parameters=PARAMETERS,
    signatures=SIGNATURES,
    letters="H index heads = KV heads, T query tokens, R requests, K block columns, D head_dim",
    physical=physical,
    take=take,
    optional=_OPTIONAL,
    named_only=frozenset({"out", "score_out"}),
    returnable=frozenset(RESULT_IN.values()),
    channelled=_CHANNELLED,
    token_dimension=_TOKEN_DIMENSION,
    fresh=_FRESH,
)
