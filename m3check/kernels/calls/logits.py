"""How kernels of fp8 indexer logits are called: keys in one tensor with windows, or in pages of values and then scales.

The result is returned; a kernel with a parameter `logits_out` writes it where it is told, or, given none, allocates it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from m3check.kernels.calls.family import Calls, Physical, Taken, checked
from m3check.types import Case, Inputs, Kernel

if TYPE_CHECKING:
    from torch import Tensor

    from m3check.paging import Guard, World

PAGE = 64
"""Tokens of a page of index keys."""

PARAMETERS: Mapping[str, str] = {
    "q": "[T, H, D] fp8 (paged: [R, next_n, H, D]): index queries; contiguous but where `far_rows` or `apart` is promised",
    "k": "[N, D] fp8, any row stride: index keys of all requests, one after the other",
    "k_scale": "[N] fp32: what a key is multiplied by",
    "weights": "[T, H] fp32: weight of each head",
    "starts": "[T] int32: the first row of k that a query sees",
    "ends": "[T] int32: one past the last; the first itself where the query sees none",
    "kv_cache": f"[pages, {PAGE}, 1, D + 4] uint8, any page stride: {PAGE} · D bytes of keys, then {PAGE} fp32 scales",
    "context_lens": "[R] int32: visible tokens of each request, its queries included; 0 is a padded row",
    "block_table": "[R, columns] int32: page of each 64 tokens; past the last one, pages not to be read",
    "max_model_len": "int: columns of the result, at least the longest context; any number",
    "logits_out": "[T, N] (paged: [R · next_n, max_model_len]) fp32, any row stride: where to write the result (optional)",
}

SIGNATURES: Mapping[str, tuple[tuple[str, ...], str]] = {
    "mqa_logits": (
        ("q", "k", "k_scale", "weights", "starts", "ends", "logits_out"),
        "[T, N] fp32, -inf outside [starts, ends) of each row",
    ),
    "paged_mqa_logits": (
        ("q", "kv_cache", "weights", "context_lens", "block_table", "max_model_len", "logits_out"),
        "[R · next_n, max_model_len] fp32, -inf past context_len - next_n + i of query i",
    ),
}


def physical(
    kernel: Kernel, inputs: Inputs, world: World, accepted: frozenset[str], upstream: Mapping[str, Tensor]
) -> Physical:
    """The tensors of one call; what no live token owns holds poison."""
    import torch

    from m3check import paging

    case = replace(inputs.case, layout=world.layout) if world.layout else inputs.case
    assert inputs.idx_q is not None
    assert inputs.idx_k is not None
    query, keys, device = inputs.idx_q, inputs.idx_k, inputs.device
    arguments: dict[str, Any] = {"weights": inputs.more["weights"].clone()}

    def buffers(columns: int) -> Callable[[frozenset[str]], dict[str, Guard]]:
        shape, unwritten = [case.total_queries, columns], paging.poison_value(torch.float32, world.poison)
        made = partial(paging.guarded, "logits_out", shape, unwritten, torch.float32, device, strided=case.layout == "pool")
        return lambda wanted: {"logits_out": made()} if "logits_out" in wanted else {}

    if kernel.op == "mqa_logits":
        wide = 64 if case.layout == "pool" else 0
        storage = paging.filled(
            [len(keys), case.head_dim + wide], paging.poison_value(keys.dtype, world.poison), keys.dtype, device
        )
        paging.words(storage)[:, : case.head_dim] = paging.words(keys)
        starts = [request.kv_start for request in case.requests() for _ in range(request.query_len)]
        ends = [r.kv_start + max(r.position(i) + 1, 0) for r in case.requests() for i in range(r.query_len)]
        arguments |= {
            "q": query.clone(),
            "k": storage[:, : case.head_dim],
            "k_scale": inputs.more["key_scale"].clone(),
            "starts": paging.lengths(starts, device),
            "ends": paging.lengths(ends, device),
        }
        return Physical(arguments, buffers(len(keys)))
    # The shuffled pages of a case twice as long have as many columns of 128 tokens as this one has of 64.
    twice = replace(inputs.case, op=world.salt, kv_lens=tuple(2 * n for n in case.kv_lens))
    layers = paging.POOL_LAYERS if case.layout == "pool" else 1
    # Far pages are far when counted in scales, of which a page holds as many as a block has of (D + 4) / 8 channels.
    first = paging.far_page(replace(case, head_dim=(case.head_dim + 4) // 8), True) if world.far else 0
    doubled = replace(world, columns=2 * world.columns, pages=2 * world.pages)
    pages = paging.Pages.shuffled(twice, "logits", device, doubled, first)
    size, split = PAGE * (case.head_dim + 4), PAGE * case.head_dim
    storage = paging.poisoned_pages([layers, size // 4], pages, world.poison, inputs.more["key_scale"]).view(torch.uint8)
    values = paging.filled([1], paging.poison_value(keys.dtype, world.poison), keys.dtype, device)
    storage[first:, :, :split] = paging.words(values)
    cache = storage[:, layers // 2]
    for request in case.requests():
        token = torch.arange(request.kv_len, device=device)
        page, slot = pages.table[request.index, token // PAGE].long(), token % PAGE
        cache[:, :split].unflatten(1, (PAGE, -1))[page, slot] = paging.words(keys[request.tokens])
        scales = inputs.more["key_scale"][request.tokens]
        cache[:, split:].unflatten(1, (PAGE, 4))[page, slot] = scales.view(torch.uint8).view(-1, 4)
    owned = pages.readable(twice)
    # A batch of several requests fills its longest row to the last column, which is rarely the last of a page.
    roomy = -(-case.context // PAGE) * PAGE + PAGE
    columns = max(world.max_seq_len, case.context if case.context and len(case.kv_lens) > 1 else roomy)
    arguments |= {
        "q": query.clone().view(len(case.kv_lens), max(case.query_lens, default=1), case.heads, case.head_dim),
        "kv_cache": cache.unflatten(1, (PAGE, 1, case.head_dim + 4)),
        "context_lens": paging.lengths(case.kv_lens, device),
        "block_table": pages.table,
        "max_model_len": columns,
    }

    return Physical(
        arguments,
        buffers(columns),
        lambda name, tensor: owned if name == "kv_cache" else None,
        lambda name, tensor: tensor[first:] if name == "kv_cache" and first else None,
        lambda result, given: _taken(kernel, result, case, columns, given),
    )


def take(kernel: Kernel, result: Any, inputs: Inputs, buffers: Mapping[str, Guard]) -> Taken:
    """The result of mqa_logits, a column for each key."""
    return _taken(kernel, result, inputs.case, inputs.case.total_tokens, buffers)


def _taken(kernel: Kernel, result: Any, case: Case, columns: int, buffers: Mapping[str, Guard]) -> Taken:
    import torch

    logits, rest = _cut(kernel.op, checked(kernel, "logits", result, (case.total_queries, columns), torch.float32), case)
    taken = Taken({"logits": logits}, {"logits": rest})
    buffer = buffers.get("logits_out")
    if buffer is not None and result.untyped_storage().data_ptr() != buffer.view.untyped_storage().data_ptr():
        taken.given["logits"], _ = _cut(kernel.op, buffer.view.detach().clone(), case)
    return taken


def _cut(op: str, whole: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """Each row's logits by token of its own request, and all cells that are no token of it. Writes into `whole`."""
    import torch

    if op == "paged_mqa_logits":
        return whole[:, : case.context], whole[:, case.context :]
    logits = torch.full((case.total_queries, case.context), -torch.inf, device=whole.device)
    for request in case.requests():
        logits[request.queries, : request.kv_len] = whole[request.queries, request.tokens]
        whole[request.queries, request.tokens] = -torch.inf
    return logits, whole


CALLS = Calls(
    parameters=PARAMETERS,
    signatures=SIGNATURES,
    letters="T query tokens, H index heads, D channels, N tokens, R requests of next_n queries each",
    physical=physical,
    take=take,
    optional=frozenset({"logits_out"}),
    named_only=frozenset({"logits_out"}),
    returnable=frozenset({"logits_out"}),
    channelled=frozenset({"q", "k", "weights", "logits_out"}),
    token_dimension={"q": 0, "k": 0, "weights": 0, "logits_out": 0},
    fresh=frozenset({"q", "weights"}),
)
