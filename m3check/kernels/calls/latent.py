"""How the kernels of sparse latent attention are called: rows of a cache by global id, a logsumexp beside the output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from m3check.kernels.calls.family import Calls, Physical, Taken, checked
from m3check.types import BEYOND, BLOCK, ROPE, Inputs, Kernel

if TYPE_CHECKING:
    from torch import Tensor

    from m3check.paging import Guard, World

PARAMETERS: Mapping[str, str] = {
    "q": "[T, Hq, D] query dtype, any strides but 1 for channels: D - 64 latent channels, then 64 of rotary position",
    "kv": "[S, 1, D] like q, any row stride: the latent cache; a row's first D - 64 channels are its value, too",
    "indices": "[T, 1, topk] int32: rows of kv for each query, -1 or rows that kv does not have (unused slots) anywhere",
    "sm_scale": "float: the logits are q·k times this",
    "d_v": "int: D - 64",
    "output": "[T, Hq, D - 64], any strides but 1 for channels: where to write the output (optional)",
    "lse_out": "[T, Hq] fp32: where to write the logsumexp (optional)",
}

SIGNATURES: Mapping[str, tuple[tuple[str, ...], str]] = {
    "mla_sparse": (
        ("q", "kv", "indices", "sm_scale", "d_v", "output", "lse_out"),
        "None, [T, Hq, D - 64], or (that, lse [T, Hq] fp32, natural or base 2 as the profile says)",
    ),
}

WIDER = 64
"""Channels that somebody else owns behind each row of a cache or of queries in layout `pool`."""


def physical(
    kernel: Kernel, inputs: Inputs, world: World, accepted: frozenset[str], upstream: Mapping[str, Tensor]
) -> Physical:
    """Each request's tokens in shuffled pages of 128 rows, ids made global; rows of no live token hold poison."""
    import torch

    from m3check import paging

    salted = replace(inputs.case, op=world.salt)
    case = replace(inputs.case, layout=world.layout) if world.layout else inputs.case
    assert inputs.q is not None
    assert inputs.k is not None
    assert inputs.topk_idx is not None
    wide = WIDER if case.layout == "pool" else 0
    row = replace(
        case, layout="hnd", head_dim=case.head_dim + wide
    )  # a pool's rows are wider, and its pages have one layer
    first = paging.far_page(row, True) if world.far else 0
    pages = paging.Pages.shuffled(salted, "latent", inputs.device, world, first)
    slots = pages.slots(case)
    storage = paging.poisoned_pages([BLOCK, 1, case.head_dim + wide], pages, world.poison, inputs.k)
    kv = storage.flatten(0, 1)[..., : case.head_dim]
    kv[slots] = inputs.k
    starts = [torch.full((request.query_len,), request.kv_start) for request in case.requests()]
    start = torch.cat([torch.zeros(0, dtype=torch.int64), *starts]).to(inputs.device)
    logical = inputs.topk_idx[0].long()
    token = (start[:, None] + logical).where(logical >= 0, 0)
    rows = slots[token].where(logical >= 0, -1) if len(slots) else torch.full_like(logical, -1)
    past = torch.arange(len(kv), len(kv) + rows.shape[1], device=inputs.device)
    past[-2:] = torch.iinfo(torch.int32).max
    rows = torch.where(logical == BEYOND, past, rows)
    q = paging.filled(
        [case.total_queries, case.heads, case.head_dim + wide],
        paging.poison_value(inputs.q.dtype, world.poison),
        inputs.q.dtype,
        inputs.device,
    )[..., : case.head_dim]
    q.copy_(inputs.q)
    live = torch.zeros(len(kv), dtype=torch.bool, device=inputs.device)
    live[slots] = True

    def buffers(wanted: frozenset[str]) -> dict[str, Guard]:
        unwritten, strided = paging.poison_value(torch.float32, world.poison), case.layout == "pool"
        shape, dtype, device = [case.total_queries, case.heads], q.dtype, inputs.device
        made = {}
        if "output" in wanted:
            made["output"] = paging.guarded(
                "output", [*shape, case.head_dim - ROPE], unwritten, dtype, device, strided=strided
            )
        if "lse_out" in wanted:
            made["lse_out"] = paging.guarded("lse_out", shape, unwritten, torch.float32, device)
        return made

    arguments = {
        "q": q,
        "kv": kv,
        "indices": rows.to(torch.int32)[:, None],
        "sm_scale": inputs.sm_scale,
        "d_v": case.head_dim - ROPE,
    }
    return Physical(
        arguments,
        buffers,
        lambda name, tensor: live if name == "kv" else None,
        lambda name, tensor: tensor[first * BLOCK :] if name == "kv" and first else None,
    )


def take(kernel: Kernel, result: Any, inputs: Inputs, buffers: Mapping[str, Guard]) -> Taken:
    """The output and, where there is one, the logsumexp: returned, or in its buffer."""
    import torch

    case = inputs.case
    assert inputs.q is not None
    out, lse = result if isinstance(result, tuple) else (result, None)
    shape = (case.total_queries, case.heads)
    taken = Taken({"out": checked(kernel, "out", out, (*shape, case.head_dim - ROPE), inputs.q.dtype)})
    if lse is None and "lse_out" in buffers:
        lse = buffers["lse_out"].view
    if lse is not None:
        taken.outputs["lse"] = checked(kernel, "lse", lse, shape, torch.float32)
    for name, buffer, held in (("out", "output", out), ("lse", "lse_out", lse)):
        if buffer in buffers and held.untyped_storage().data_ptr() != buffers[buffer].view.untyped_storage().data_ptr():
            taken.given[name] = buffers[buffer].view.detach().clone()
    return taken


CALLS = Calls(
    parameters=PARAMETERS,
    signatures=SIGNATURES,
    letters="T query tokens, Hq query heads, S rows of the cache, D channels of a latent key (576)",
    physical=physical,
    take=take,
    optional=frozenset({"d_v", "output", "lse_out"}),
    named_only=frozenset({"output", "lse_out"}),
    returnable=frozenset({"output", "lse_out"}),
    channelled=frozenset({"q", "kv", "output"}),
    token_dimension={"q": 0, "indices": 0, "output": 0, "lse_out": 0},
    fresh=frozenset({"q", "indices"}),
)
