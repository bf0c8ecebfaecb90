"""How the pieces of vLLM's path on AMD are called, and how a table of physical pages is read back as logical ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from m3check.kernels.calls import sparse
from m3check.kernels.calls.family import BrokenContract, Calls, Physical, Taken, checked
from m3check.types import BLOCK, OPS, Inputs, Kernel, blocks, skipped

if TYPE_CHECKING:
    from torch import Tensor

    from m3check.paging import Guard, Pages, World

PARAMETERS: Mapping[str, str] = {
    "attention_block_table": "[R, columns] int32: page of each logical block in the main cache",
    "query_req_id": "[T] int32: request of each query",
    "query_abs_pos": "[T] int32: token position of each query",
    "block_page_stride": "int: page ids that a block spans, 8, or 16 where keys and values share a block",
    "sparse_block_table_out": "[T, topk * 8] int32: where to write the 16-token pages, page id 0 in cells without one",
    "sparse_context_lens_out": "[T] int32: where to write how many tokens of them a query sees",
    "completion_counter": "[H, T] int32, zero before and after the call: what programs of a launch may count on",
    "index_k": "[T, D]: index keys, rows of any stride",
    "index_cache": "[pages, 128, D]: the index cache, which is written in place",
    "index_slot_mapping": "[T] int64: page · 128 + offset of each key; a negative slot is none",
    "slot_mapping": "likewise, of each token in the main cache",
    "block_size": "int: 128",
    "ranks": "int: processes that share the blocks, block b belonging to b mod ranks; the function plays all of them",
}

_TABLE = "(table [T, topk * 8] int32, context lengths [T] int32)"
_IDS = "[H, T, topk] int32, -1 in unused slots"
_DECODE = ("idx_q", "index_kv_cache", "block_table", "seq_lens", "max_seq_len", "topk", "init_blocks", "local_blocks",
           "num_kv_heads", "decode_query_len")  # fmt: skip
_GIVEN = ("score", "seq_lens", "max_seq_len", "topk", "init_blocks", "local_blocks", "decode_query_len", "ranks", "out")
_WRITTEN = ("attention_block_table", "sparse_block_table_out", "sparse_context_lens_out", "block_page_stride")
_BESIDE = "the table and the context lengths in the buffers given"

SIGNATURES: Mapping[str, tuple[tuple[str, ...], str]] = {
    "sparse_pa_table": (("topk_idx", "block_table", "query_req_id", "query_abs_pos", "block_page_stride"), _TABLE),
    "sparse_pa_table_decode": (("topk_idx", "block_table", "seq_lens", "decode_query_len", "block_page_stride"), _TABLE),
    "index_decode_table": (
        (*_DECODE, "max_decode_query_len", "out", *_WRITTEN, "completion_counter"),
        f"{_IDS}; {_BESIDE}",
    ),
    "index_decode_cp": ((*_DECODE, "sm_scale", "ranks", "out"), _IDS),
    "index_insert": (("index_k", "index_cache", "index_slot_mapping"), "None: the cache holds the keys"),
    "page16_rebase": (
        ("slot_mapping", "block_table", "block_size"),
        "(slots [T] int64, block table [R, columns] int32): a block has twice as many pages; negative slots are kept",
    ),
    "index_topk_cp": (_GIVEN, _IDS),
    "index_topk_cp_table": ((*_GIVEN, *_WRITTEN), f"{_IDS}; {_BESIDE}"),
}

FIRST_PAGE = 1
"""Page id 0 stands for a cell without a page, so that no request owns it."""


def physical(
    kernel: Kernel, inputs: Inputs, world: World, accepted: frozenset[str], upstream: Mapping[str, Tensor]
) -> Physical:
    """The tensors of one call; what the block-sparse ops have too is made as theirs is."""
    from m3check import paging

    case, device, op = inputs.case, inputs.device, kernel.op
    stride = 8 if case.layout == "hnd" else 16
    first = FIRST_PAGE
    if op == "index_insert":
        first = paging.far_page(replace(case, layout=world.layout or case.layout), True) if world.far else 0
    pages = paging.Pages.shuffled(replace(case, op=world.salt), "main", device, world, first)
    positions = [request.position(i) for request in case.requests() for i in range(request.query_len)]
    owners = [request.index for request in case.requests() for _ in range(request.query_len)]
    arguments: dict[str, Any] = {
        "query_req_id": paging.lengths(owners, device),
        "query_abs_pos": paging.lengths(positions, device),
        "block_page_stride": stride,
        "ranks": max(2, min(case.kv_heads, 4)),  # where there are more heads, each merges several
    }
    if op in ("sparse_pa_table", "sparse_pa_table_decode"):
        assert inputs.topk_idx is not None
        arguments |= {
            "topk_idx": paging.apart(inputs.topk_idx) if stride == 16 else inputs.topk_idx.clone(),
            "block_table": pages.table,
            "seq_lens": paging.lengths(case.kv_lens, device),
            "decode_query_len": max(case.query_lens, default=1),
        }
        return Physical(
            arguments,
            lambda wanted: {},
            take=lambda result, buffers: Taken(_table(kernel, inputs, pages.table, stride, result)),
        )
    if op in ("index_insert", "page16_rebase"):
        return _slots(kernel, inputs, world, pages)
    like = replace(kernel, op="index_topk" if "score" in SIGNATURES[op][0] else "index_decode")
    made = sparse.physical(like, inputs, world, accepted, upstream)
    made.arguments |= arguments | {"attention_block_table": pages.table}
    if "pages" not in OPS[op].outputs:
        return made

    def buffers(wanted: frozenset[str]) -> dict[str, Guard]:
        import torch

        rows, int32 = case.total_queries, torch.int32
        stale = paging.IMPOSSIBLE_ID if world.poison == "nan" else 0
        given = {
            "sparse_block_table_out": paging.guarded(
                "sparse_block_table_out", [rows, case.topk * 8], stale, int32, device, strided=case.layout == "pool"
            ),
            "sparse_context_lens_out": paging.guarded("sparse_context_lens_out", [1, rows], stale, int32, device),
            "completion_counter": paging.guarded("completion_counter", [case.kv_heads, rows], 0, int32, device),
        }
        given["sparse_context_lens_out"].view = given["sparse_context_lens_out"].view[0]
        return made.buffers(wanted) | {name: guard for name, guard in given.items() if name in wanted}

    def take_both(result: Any, buffers: Mapping[str, Guard]) -> Taken:
        taken = sparse.take(like, result, inputs, buffers)
        table = (buffers["sparse_block_table_out"].view, buffers["sparse_context_lens_out"].view)
        taken.outputs |= _table(kernel, inputs, pages.table, stride, table)
        if "completion_counter" in buffers:
            taken.outputs["counter"] = buffers["completion_counter"].view.clone()
        return taken

    return replace(made, buffers=buffers, take=take_both)


def _slots(kernel: Kernel, inputs: Inputs, world: World, pages: Pages) -> Physical:
    """Tokens at their slots, every fifth without one; a cache, and a page around it, of which only those may be written."""
    import torch

    from m3check import paging

    case, device, table = inputs.case, inputs.device, pages.table
    places = [(r.index, r.position(i)) for r in case.requests() for i in range(r.query_len)]
    real = torch.tensor([int(table[r, p // BLOCK]) * BLOCK + p % BLOCK for r, p in places], device=device)
    kept = torch.tensor([not skipped(t) for t in range(len(places))], device=device)
    slots = real.where(kept, -1)
    if kernel.op == "page16_rebase":
        return Physical(
            {"slot_mapping": slots, "block_table": table, "block_size": BLOCK},
            lambda wanted: {},
            take=lambda result, buffers: Taken(_renumbered(kernel, inputs, table, places, result)),
        )
    from m3check.kernels.calls.slots import Slots

    keys, cached = inputs.more["index_k"], inputs.more["cached"]
    layers = paging.POOL_LAYERS if (world.layout or case.layout) == "pool" else 1
    storage, backing = paging.watched_pages([layers, BLOCK, case.head_dim], pages, world.poison, cached.dtype)
    cache = Slots("index_cache", backing, storage[:, layers // 2], slots, pages)
    wide = paging.filled(
        [len(places), 2 * case.head_dim], paging.poison_value(keys.dtype, world.poison), keys.dtype, device
    )
    wide[:, case.head_dim :] = keys
    return Physical(
        {"index_k": wide[:, case.head_dim :], "index_slot_mapping": slots},
        lambda wanted: {"index_cache": cache},
        take=lambda result, buffers: Taken({"index_keys": cache.rows()[:, 0].double()}),
    )


def _renumbered(
    kernel: Kernel, inputs: Inputs, block_table: Tensor, places: list[tuple[int, int]], result: Any
) -> dict[str, Tensor]:
    """`slots` [T] and `blocks` [R, K] as logical numbers: -2 for what stands for none of the row's own request."""
    import torch

    case = inputs.case
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise BrokenContract(f"{kernel.name} returned {type(result).__name__}, wanted slots and a block table")
    slots = checked(kernel, "slots", result[0], (len(places),), torch.int64).tolist()
    table = checked(kernel, "a block table", result[1], tuple(block_table.shape), torch.int32).tolist()
    # a block holds its 128 keys, then its 128 values: page p begins at slot 256 · p, and at page id 2 · p of 128 tokens
    owner = {(r, int(page)): b for r, n in enumerate(case.kv_lens) for b, page in enumerate(block_table[r, : blocks(n)])}
    found = []
    for (r, _), slot in zip(places, slots, strict=True):
        block = owner.get((r, slot // 256), -1) if slot % 256 < BLOCK else -1
        found.append(slot if slot < 0 else block * BLOCK + slot % 256 if block >= 0 else -2)
    rows = [
        [-1 if b >= blocks(n) else owner.get((r, page // 2), -2) if page % 2 == 0 else -2 for b, page in enumerate(row)]
        for r, (n, row) in enumerate(zip(case.kv_lens, table, strict=True))
    ]
    return {"slots": torch.tensor(found), "blocks": torch.tensor(rows)[:, : case.block_columns]}


def take(kernel: Kernel, result: Any, inputs: Inputs, buffers: Mapping[str, Guard]) -> Taken:
    """Ids in logical form; tables are read by what `physical` leaves with the call."""
    return sparse.take(replace(kernel, op="index_decode"), result, inputs, buffers)


def _table(kernel: Kernel, inputs: Inputs, block_table: Tensor, stride: int, result: Any) -> dict[str, Tensor]:
    """`pages` [T, topk · 8] int64 and `context` [T]: 8·b + j for part j of logical block b, -1 for page id 0, -2 for any
    id that is no such part of a block of the row's own request."""
    import torch

    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise BrokenContract(f"{kernel.name} returned {type(result).__name__}, wanted {_TABLE}")
    case, rows = inputs.case, inputs.case.total_queries
    table = checked(kernel, "a table", result[0], (rows, case.topk * 8), torch.int32).long()
    context = checked(kernel, "context lengths", result[1], (rows,), torch.int32)
    pages = int(block_table.max()) + 1 if block_table.numel() else 1
    owner = torch.full((len(case.kv_lens), pages), -2, dtype=torch.int64)
    for request in case.requests():
        own = block_table[request.index, : blocks(request.kv_len)].long().cpu()
        owner[request.index, own] = torch.arange(len(own))
    owner = owner.to(table.device)
    owners = [r.index for r in case.requests() for _ in range(r.query_len)]
    request_of = torch.tensor(owners, dtype=torch.int64, device=table.device)
    page, part = table.div(stride, rounding_mode="floor"), table.remainder(stride)
    known = (page >= 0) & (page < owner.shape[1]) & (part < BLOCK // 16)
    block = owner[request_of[:, None], page.where(known, 0)]
    logical = torch.where(known & (block >= 0), block * 8 + part, -2).masked_fill(table == 0, -1)
    return {"pages": logical, "context": context}


_SHARED = {name: told for name, told in sparse.PARAMETERS.items() if any(name in names for names, _ in SIGNATURES.values())}

CALLS = Calls(
    parameters={**_SHARED, **PARAMETERS},
    signatures=SIGNATURES,
    letters="H index heads = KV heads, T query tokens, R requests, K block columns, D head_dim",
    physical=physical,
    take=take,
    optional=frozenset({"out", "num_kv_heads", "max_seq_len", "max_decode_query_len", "block_page_stride",
                        "decode_query_len", "completion_counter", "ranks", "sm_scale"}),
    named_only=frozenset({"out"}),
    returnable=frozenset({"out"}),
    channelled=frozenset({"index_k"}),
    fresh=frozenset({"idx_q", "score", "topk_idx"}),
    token_dimension={"topk_idx": 1},
    held=frozenset({"completion_counter"}),
)  # fmt: skip
