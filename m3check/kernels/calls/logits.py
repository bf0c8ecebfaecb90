"""How kernels of fp8 indexer logits are called: keys in one tensor with windows, or in pages of values and then scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from m3check.kernels.calls.family import Calls, Physical, Taken, checked
from m3check.types import Inputs, Kernel

if TYPE_CHECKING:
    from torch import Tensor

    from m3check.paging import Guard, World

PAGE = 64
"""Tokens of a page of index keys."""

PARAMETERS: Mapping[str, str] = {
    "q": "[T, H, D] fp8 (paged: [R, next_n, H, D], contiguous): index queries",
    "k": "[N, D] fp8, any row stride: index keys of all requests, one after the other",
    "k_scale": "[N] fp32: what a key is multiplied by",
    "weights": "[T, H] fp32: weight of each head",
    "starts": "[T] int32: the first row of k that a query sees",
    "ends": "[T] int32: one past the last; the first itself where the query sees none",
    "kv_cache": f"[pages, {PAGE}, 1, D + 4] uint8, any page stride: {PAGE} · D bytes of keys, then {PAGE} fp32 scales",
    "context_lens": "[R] int32: visible tokens of each request, its queries included; 0 is a padded row",
    "block_table": "[R, columns] int32: page of each 64 tokens; past the last one, pages not to be read",
    "max_model_len": "int: columns of the result",
}

SIGNATURES: Mapping[str, tuple[tuple[str, ...], str]] = {
    "mqa_logits": (
        ("q", "k", "k_scale", "weights", "starts", "ends"),
        "[T, N] fp32, -inf outside [starts, ends) of each row",
    ),
    "paged_mqa_logits": (
        ("q", "kv_cache", "weights", "context_lens", "block_table", "max_model_len"),
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
        return Physical(arguments, lambda wanted: {})
    # The shuffled pages of a case twice as long have as many columns of 128 tokens as this one has of 64.
    twice = replace(inputs.case, op=world.salt, kv_lens=tuple(2 * n for n in case.kv_lens))
    pages = paging.Pages.shuffled(twice, "logits", device, replace(world, columns=2 * world.columns))
    size = PAGE * (case.head_dim + 4)
    layers = paging.POOL_LAYERS if case.layout == "pool" else 1
    storage = torch.empty(pages.count, layers, size, dtype=torch.uint8, device=device)
    split = PAGE * case.head_dim
    values = paging.filled([1], paging.poison_value(keys.dtype, world.poison), keys.dtype, device)
    storage[..., :split] = paging.words(values)
    storage.view(torch.float32)[..., split // 4 :] = paging.poison_value(torch.float32, world.poison)
    cache = storage[:, layers // 2]
    for request in case.requests():
        token = torch.arange(request.kv_len, device=device)
        page, slot = pages.table[request.index, token // PAGE].long(), token % PAGE
        cache[:, :split].unflatten(1, (PAGE, -1))[page, slot] = paging.words(keys[request.tokens])
        scales = inputs.more["key_scale"][request.tokens]
        cache[:, split:].unflatten(1, (PAGE, 4))[page, slot] = scales.view(torch.uint8).view(-1, 4)
    owned = pages.readable(twice)
    columns = max(world.max_seq_len, -(-case.context // PAGE) * PAGE + PAGE)
    arguments |= {
        "q": query.clone().view(len(case.kv_lens), max(case.query_lens, default=1), case.heads, case.head_dim),
        "kv_cache": cache.view(pages.count, PAGE, 1, case.head_dim + 4),
        "context_lens": paging.lengths(case.kv_lens, device),
        "block_table": pages.table,
        "max_model_len": columns,
    }

    def taken(result: Any, buffers: Mapping[str, Guard]) -> Taken:
        whole = checked(kernel, "logits", result, (case.total_queries, columns), torch.float32)
        return Taken({"logits": whole[:, : case.context]}, {"logits": whole[:, case.context :]})

    return Physical(arguments, lambda wanted: {}, lambda name, tensor: owned if name == "kv_cache" else None, take=taken)


def take(kernel: Kernel, result: Any, inputs: Inputs, buffers: Mapping[str, Guard]) -> Taken:
    """Of mqa_logits: each row's logits by token of its own request; in `beyond`, all cells that are no token of it."""
    import torch

    case = inputs.case
    rest = checked(kernel, "logits", result, (case.total_queries, case.total_tokens), torch.float32)
    logits = torch.full((case.total_queries, case.context), -torch.inf, device=rest.device)
    for request in case.requests():
        logits[request.queries, : request.kv_len] = rest[request.queries, request.tokens]
        rest[request.queries, request.tokens] = -torch.inf
    return Taken({"logits": logits}, {"logits": rest})


CALLS = Calls(
    parameters=PARAMETERS,
    signatures=SIGNATURES,
    letters="T query tokens, H index heads, D channels, N tokens, R requests of next_n queries each",
    physical=physical,
    take=take,
    token_dimension={},
    fresh=frozenset({"q", "weights"}),
)
